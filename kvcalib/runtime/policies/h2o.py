"""Heavy hitters by accumulated attention (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from torch import Tensor

from kvcalib.runtime.policies.policy import Held, Policy


class H2O(Policy):
    """score = sum over all queries so far of the attention they paid; older tokens were seen by more of them.

    The paper splits its budget into halves, recent and heavy; here `recent` says.
    """

    name = "h2o"
    attention = True

    def score(self, held: Held) -> Tensor:
        return held.drawn
