"""Run the client's command line: `python -m service.client "prompt"`."""

import signal
import sys

from service.client.terminal.interrupt import Interrupt


def main() -> None:
    """Handle Ctrl-C, then run the command line; the word `admin` leads to the admin commands."""
    if sys.argv[1:2] == ["admin"]:
        from service.client.terminal import admin

        admin.app(args=sys.argv[2:], prog_name="a2sf-client admin")
    interrupt = Interrupt()
    signal.signal(signal.SIGINT, interrupt)
    # Imported after that, because it is slow to load.
    from service.client.terminal.cli import app

    app(prog_name="a2sf-client", obj=interrupt)


if __name__ == "__main__":
    main()
