"""Run the client's command line: `python -m service.client "prompt"`."""

import signal

from service.client.interrupt import Interrupt


def main() -> None:
    """Run it."""
    interrupt = Interrupt()
    signal.signal(signal.SIGINT, interrupt)
    # After that, for it takes a while to load.
    from service.client.cli import app

    app(prog_name="a2sf-client", obj=interrupt)


if __name__ == "__main__":
    main()
