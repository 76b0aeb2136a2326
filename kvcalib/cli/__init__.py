"""The `kvcalib` command line."""

from kvcalib.cli import evaluate as evaluate
from kvcalib.cli import inspecting as inspecting
from kvcalib.cli import refining as refining
from kvcalib.cli import report as report
from kvcalib.cli import sharing as sharing
from kvcalib.cli import sweep as sweep
from kvcalib.cli.commands import app

__all__ = ["app"]
