"""`python -m kvcalib` is the `kvcalib` command."""

import sys


def main() -> None:
    """The command; who presses Ctrl-C while it is being loaded gets one line too."""
    try:
        from kvcalib.cli import app
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    app(prog_name="kvcalib")


if __name__ == "__main__":
    main()
