"""Tiny models made in the test; no file from outside the repository."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on CPU tensors; it must be chosen before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny import tiny_llama  # noqa: E402


def pytest_terminal_summary(terminalreporter):
    """A report that no browser opened is said aloud, below all else."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    if any("NO BROWSER" in reason for reason in skipped):
        terminalreporter.section("the report was not opened in a browser", red=True, bold=True)
        terminalreporter.write_line(next(reason for reason in skipped if "NO BROWSER" in reason), red=True)


@pytest.fixture(scope="session", autouse=True)
def demo_text_is_read_once():
    """The embedded text is the same throughout, and reading it takes seconds."""
    import kvcalib.demo

    kvcalib.demo.documents = functools.cache(kvcalib.demo.documents)


@pytest.fixture
def llama():
    return tiny_llama()
