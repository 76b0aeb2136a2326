"""Sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from torch import Tensor

from kvcalib.runtime.policies.policy import Held, Policy


class Window(Policy):
    """score = position."""

    name = "window"

    def score(self, held: Held) -> Tensor:
        return held.position.float()
