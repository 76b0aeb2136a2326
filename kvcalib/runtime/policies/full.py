"""Everything stays: the packed cache without eviction, behind the same interface."""

from __future__ import annotations

from kvcalib.runtime.policies.policy import Policy


class Full(Policy):
    """All tokens stay, whatever the budget."""

    name = "full"
    evicts = False
