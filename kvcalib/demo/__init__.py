"""The demo: a small language model and English text, so that everything can be tried without a network."""

from pathlib import Path

from kvcalib.demo.text import documents

MODEL_DIR: Path = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "documents"]
