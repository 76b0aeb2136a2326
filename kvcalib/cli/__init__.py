"""The `kvcalib` command line."""

from kvcalib.cli import evaluate as evaluate
from kvcalib.cli import sharing as sharing
from kvcalib.cli.commands import app

__all__ = ["app"]
