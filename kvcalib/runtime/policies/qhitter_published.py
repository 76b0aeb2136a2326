"""Q-Hitter's oracle as its authors' code has it (commit 0e851a5), without that code's faults.

Kept are the recent tokens; of the rest the `n_default` with the largest accumulated attention h; of what then remains
the `n_combined` with the largest

    c = alpha * u(h) + (1 - alpha) * (2 - u(|k - k^|) - u(|v - v^|)) / 2

where u maps the least to 0 and the greatest to 1 over all heads and tokens of the layer. With the paper's shares of a
prompt of S tokens: .05 S recent, .07 S default, .08 S combined. The budget stays what the first eviction found.

Other than that code: every row of a batch for itself, grouped heads, padding, any number of prompt chunks, prompts of a
few tokens, the quantizer that really stores; and decoded tokens are compared with all tokens held, not with the other
heads' copies of themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcalib.runtime.policies.policy import Held, Policy, best, unit

DEFAULT_SHARE = 7 / 15


class QHitterPublished(Policy):
    """See the module; alpha is .5 for every layer, as in the authors' script."""

    name = "qhitter-published"
    attention = True
    traits = 2
    trait_dtype = torch.float32
    sinks = 0
    every = 0.0
    grows = False

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = alpha

    def observe(self, key: Tensor, value: Tensor) -> Tensor:
        return torch.stack([key[..., 0].sqrt(), value[..., 0].sqrt()], -1)

    def choose(self, held: Held, free: Tensor, count: Tensor) -> Tensor:
        first = torch.minimum(whole(held.heavy * DEFAULT_SHARE), count)
        second = torch.minimum(whole(held.heavy * (1 - DEFAULT_SHARE)).clamp(min=1), count - first)
        default = best(held.drawn, free, first)
        return default | best(self.score(held), free & ~default, second)

    def score(self, held: Held) -> Tensor:
        used, everywhere = held.position >= 0, (1, 2)
        error = sum(unit(held.traits[..., i], used, everywhere) for i in (0, 1))
        return self.alpha * unit(held.drawn, used, everywhere) + (1 - self.alpha) * (2 - error) / 2


def whole(x: Tensor) -> Tensor:
    """Rounded down; .07 * 100 is 7."""
    return (x + 1e-9).floor().long()
