"""Run the command line: `python -m tuner`; `fit` may be said or left out.

Owns what must hold before anything else is imported: Ctrl-C, and what to install where something
is missing. Knows nothing of the commands but that options alone mean `fit`.
"""

import sys

from a2sf.threads import wait_passively
from tuner.interrupt import telling

GO_ON = "interrupted; what is measured is kept: run the same command to go on"
AGAIN = "interrupted: run the same command to begin again"


def main() -> None:
    """Run it."""
    # Nothing above imports torch.
    wait_passively()
    arguments = sys.argv[1:]
    # Bare options mean fit. A word that is no command is refused as such, and nothing means help.
    if arguments and arguments[0].startswith("-") and arguments[0] != "--help":
        arguments = ["fit", *arguments]
    with telling(GO_ON if arguments[:1] == ["fit"] else AGAIN):
        try:
            from tuner.cli import run

            run(arguments)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in ("a2sf", "tuner"):
                raise
            print(
                f"error: {error}; the tuner is an extra: pip install 'a2sf-serve[tune]'",
                file=sys.stderr,
            )
            sys.exit(2)


if __name__ == "__main__":
    main()
