"""`python -m kvcalib` is the `kvcalib` command."""

from kvcalib.cli import app

app(prog_name="kvcalib")
