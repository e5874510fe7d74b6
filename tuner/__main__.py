"""Runs the command line: `python -m tuner`. The command `fit` is the default.

Owns what must happen before other imports: handling of Ctrl-C, and the message that names a missing
package. Knows nothing of the commands, except that options without a command mean `fit`.
"""

import sys

from a2sf.threads import wait_passively
from tuner.interrupt import message_on_interrupt

RESUME_MESSAGE = "interrupted; all measurements are kept: run the same command to continue"
RESTART_MESSAGE = "interrupted: run the same command to start again"


def main() -> None:
    """Run the command line."""
    # Nothing imported above imports torch.
    wait_passively()
    arguments = sys.argv[1:]
    # Options without a command mean fit. An unknown word is reported as an unknown command. No
    # arguments at all show the help.
    if arguments and arguments[0].startswith("-") and arguments[0] != "--help":
        arguments = ["fit", *arguments]
    with message_on_interrupt(RESUME_MESSAGE if arguments[:1] == ["fit"] else RESTART_MESSAGE):
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
