"""How far one set of logits is from another, per position."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512


def compare_logits(expected: Tensor, found: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Position by position, `expected, found [N, V]`, `targets [N]` (-1: no target). All float64 `[N]`, on the CPU.

    Returns:
        `kld`: KL(expected || found) in nats; `agree`: 1 where the most likely token is the same;
        `expected_nll`, `nll`: of the target, 0 where there is none.
    """
    parts: dict[str, list[Tensor]] = {"kld": [], "agree": [], "expected_nll": [], "nll": []}
    for start in range(0, len(targets), BLOCK):
        part = slice(start, start + BLOCK)
        p = expected[part].float().log_softmax(-1)
        q = found[part].float().log_softmax(-1)
        target = targets[part].to(p.device)
        known = (target >= 0).double()
        place = target.clamp(min=0)[:, None]
        parts["kld"].append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        parts["agree"].append((p.argmax(-1) == q.argmax(-1)).double())
        parts["expected_nll"].append(-p.gather(1, place)[:, 0].double() * known)
        parts["nll"].append(-q.gather(1, place)[:, 0].double() * known)
    return {name: torch.cat(values).cpu() for name, values in parts.items()}
