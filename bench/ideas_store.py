"""What storage would show, computed in floats: `bench/ideas.py` puts it in place of keys and values.

`Scalar` is the quantizer of a layer's keys or values without outliers, as `quant/quantizer.py` has it, with a linear
map of each head before rounding and back after it. `replay` runs a model on it: each sequence in one pass, every token
as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcalib.evaluation.divergence import compare_logits
from kvcalib.evaluation.passes import batches, next_tokens
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.feedback import DAMPING, Feedback
from kvcalib.quant.quantizer import Scope, saturate

Stored = dict[tuple[int, str], Any]
"""By layer and role, what has `show(x [N, H, D])`."""


@dataclass
class Map:
    """`y = x turn` of each head and `x = y back`: `[H, D, D]` each, the inverse of one another."""

    turn: Tensor
    back: Tensor

    @classmethod
    def orthogonal(cls, basis: np.ndarray) -> Map:
        """Of bases `[H, D, D]` whose columns are the new channels."""
        turn = torch.from_numpy(basis).float()
        return cls(turn, turn.mT.contiguous())

    def forth(self, x: Tensor) -> Tensor:
        """`x [N, H, D]` in the new channels."""
        return torch.einsum("nhd,hde->nhe", x, self.turn)

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient with respect to the new channels: `dL/dy = back dL/dx`."""
        return torch.einsum("nhd,hed->nhe", g, self.back)

    def inverse(self, y: Tensor) -> Tensor:
        """The new channels `y [N, H, D]` as the old ones."""
        return torch.einsum("nhe,hed->nhd", y, self.back)


def curvature_of(gradients: Tensor) -> Tensor:
    """Mean of `g g'` over `gradients [N, H, D]`: float64 `[H, D, D]`."""
    g = gradients.double()
    return torch.einsum("nhd,nhe->hde", g, g) / len(g)


def left_by_feedback(curvature: Tensor, feedback: Feedback) -> Tensor:
    """What an error of each channel still costs when later channels make up for it, over what it cost: `[H, D]`.

    That is `d_k / C_kk` of `C = M' diag(d) M`, C damped as for the feedback.
    """
    order, above = feedback.order, feedback.matrix.double()
    dim = order.shape[1]
    mean = curvature.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    damped = curvature + DAMPING * mean[:, None, None] * torch.eye(dim, dtype=torch.float64)
    permuted = damped.gather(1, order[..., None].expand_as(damped)).gather(2, order[:, None].expand_as(damped))
    back = torch.linalg.inv(above.mT + torch.eye(dim, dtype=torch.float64))
    d = (back.mT @ permuted @ back).diagonal(dim1=1, dim2=2)
    share = d / permuted.diagonal(dim1=1, dim2=2)
    return torch.empty_like(share).scatter_(1, order, share).clamp(max=1)


def normalised(x: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor]:
    """`x [N, H, D]` relative to the zero and scale of its token (or token and head), as the cache keeps these."""
    grouped = x.float().reshape(len(x), x.shape[1] if scope == "head" else 1, -1)
    lower, upper = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    zero = saturate((lower + upper) / 2, torch.float16).float()
    scale = saturate((upper - lower) / 2, torch.float16).float()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((grouped - zero) / scale).reshape(x.shape), zero, scale


@dataclass
class Scalar:
    """Keys (`relative` False) or values of one layer with a codebook for every channel."""

    codebook: Codebook
    relative: bool
    scope: Scope = "token"
    map: Map | None = None
    feedback: Feedback | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest centroids to `x [N, H, D]`, with feedback if there is one."""
        codes = self.codebook.encode(x)
        if self.feedback is not None:
            # Relative to zero and scale of its token every error is as many times smaller: the same codes.
            codes = self.feedback.encode(self.codebook, x, codes, None, None)
        return self.codebook.decode(codes)

    def show(self, x: Tensor) -> Tensor:
        """What attention would read of `x [N, H, D]`."""
        y = x.float() if self.map is None else self.map.forth(x.float())
        if self.relative:
            normal, zero, scale = normalised(y, self.scope)
            grouped = self.rounded(normal).reshape(len(y), zero.shape[1], -1)
            y = (zero + scale * grouped).reshape(y.shape)
        else:
            y = self.rounded(y)
        return y if self.map is None else self.map.inverse(y)


class Replayed:
    """Handler of the taps: attention over what is shown of keys and values."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def _shown(self, call: Call, role: str, x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        shown = self.stored[call.tap.layer, role].show(x.transpose(1, 2).reshape(-1, heads, dim))
        return shown.reshape(batch, tokens, heads, dim).transpose(1, 2)

    def attend(self, call: Call) -> AttentionOutput:
        """Attention of one layer."""
        key, value = self._shown(call, "key", call.key), self._shown(call, "value", call.value)
        return call.plain(call.rotate_new(call.query), call.rotate_new(key), value)


def exact_logits(model: Any, sequences: np.ndarray) -> list[Tensor]:
    """Logits `[T, V]` of the untouched model, one for each of `sequences [N, T]`."""
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits[0] for ids in batches(model, sequences, 1)]


def replay(model: Any, rotations: Any, stored: Stored, sequences: np.ndarray, expected: list[Tensor]) -> np.ndarray:
    """Mean KLD of every one of `sequences [N, T]` against its `expected` logits, nats: `[N]`."""
    found = []
    with Taps(model, Replayed(stored), rotations), torch.no_grad():
        for ids, logits in zip(batches(model, sequences, 1), expected, strict=True):
            shown = model(input_ids=ids, use_cache=False).logits[0]
            found.append(float(compare_logits(logits, shown, next_tokens(ids)[0])["kld"].mean()))
    return np.array(found)
