"""Run the client's command line: `python -m service.client "prompt"`."""

from service.client.cli import app


def main() -> None:
    """Run it."""
    app(prog_name="a2sf-client")


if __name__ == "__main__":
    main()
