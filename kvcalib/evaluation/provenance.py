"""Where and when figures were made."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

import torch
import transformers


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """What this runs on, in a line."""
    processor = f"{os.cpu_count()} cores, {platform.platform()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return processor
    return f"{torch.cuda.get_device_name()}, {processor}"


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
