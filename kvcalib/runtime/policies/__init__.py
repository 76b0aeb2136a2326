"""Which tokens of a full cache stay: one policy, one file, one class.

A new one subclasses `Policy` in a file of its own and is named in `POLICIES`.
"""

from __future__ import annotations

from kvcalib.runtime.policies.full import Full
from kvcalib.runtime.policies.h2o import H2O
from kvcalib.runtime.policies.policy import Held, Policy
from kvcalib.runtime.policies.qhitter import QHitter
from kvcalib.runtime.policies.qhitter_published import QHitterPublished
from kvcalib.runtime.policies.window import Window

POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Full, Window, H2O, QHitterPublished, QHitter)}

__all__ = ["POLICIES", "Held", "Policy", "find"]


def find(policy: str | Policy) -> Policy:
    """The policy of a name, or the one given.

    Raises:
        ValueError: no policy has that name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
