"""The `kvcalib` command line."""

from kvcalib.cli.commands import app

__all__ = ["app"]
