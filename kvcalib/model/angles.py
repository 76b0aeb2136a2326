"""A layer's rotary embedding as plain numbers: which channels form a pair, and how fast each pair turns.

`rotary.py` rotates with the model's own function and module; fused kernels need the numbers behind them. They are read
off the model, not off its config: the pairs from what the function does to unit vectors, the frequencies from the
module's `inv_freq` buffers, matched to what the module answers. With them the angle of position t is `t * frequency` in
float64, exact at a million positions, where float32 angles are off by tenths of a radian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvcalib.model.rotary import RotaryCall, Rotation

CHANGING = ("dynamic", "longrope")
PROBES = (1, 2, 3, 5, 9, 17, 40, 101)
TOLERANCE = 2e-4
_KNOWN: WeakValueDictionary[tuple[bytes, ...], Angles] = WeakValueDictionary()
"""Equal angles are one object: tables hang on it, and would be made anew at every `attach`."""


@dataclass(eq=False)
class Angles:
    """Rotation of one layer's keys, P = D / 2 pairs: `(a, b)` at position t becomes
    `scale * (a cos - b sin, b cos + a sin)` with the angle `t * frequency`.

    Attributes:
        first, second: `[P]` int64, the channels of each pair.
        frequency: `[P]` float64, radians per position; 0 for channels that do not turn.
        scale: `[P]` float32, the attention scaling that some rotary embeddings carry (YaRN, arXiv 2309.00071).
    """

    first: Tensor
    second: Tensor
    frequency: Tensor
    scale: Tensor

    @cached_property
    def turns(self) -> bool:
        """Whether anything turns at all (not in NoPE layers)."""
        return bool((self.frequency != 0).any())

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine without `scale`, float32 `[T, P]`, of `positions [T]`; the angle is taken in float64."""
        angle = positions.double()[:, None] * self.frequency.to(positions.device)
        return angle.cos().float(), angle.sin().float()

    @classmethod
    def of(cls, rotation: Rotation, call: RotaryCall | None, head_dim: int) -> Angles | None:
        """The numbers behind `rotation` and `call`; None where they change with the length or cannot be found."""
        if head_dim % 2:
            return None
        if rotation.style == "none" or call is None:
            partner = pair_up([-1] * head_dim)
            first = [i for i in range(head_dim) if partner[i] > i]
            return cls._make(first, [partner[i] for i in first], [0.0] * len(first), [1.0] * len(first))
        if _changes(call):
            return None
        positions = torch.tensor([PROBES])
        device = call.position_ids.device
        probe = torch.empty(1, 1, 1, dtype=torch.float32, device=device)
        cos, sin = (x.cpu() for x in call.module(probe, position_ids=positions.to(device), **call.extra))
        signed = signed_partners(rotation, head_dim, cos.shape[-1])
        if signed is None:
            return None
        partner = pair_up([abs(s) - 1 for s in signed])
        first = [i for i in range(head_dim) if (signed[i] > 0 or (signed[i] == 0 and partner[i] > i))]
        second = [partner[i] for i in first]
        basis = torch.eye(head_dim)[first]
        frequency, scale = [], []
        turned = torch.stack(
            [
                rotation.apply(basis[None, None], c.expand(1, len(first), -1), s.expand(1, len(first), -1))[0, 0]
                for c, s in zip(cos[0], sin[0], strict=True)
            ]
        )
        index = torch.arange(len(first))
        found_cos, found_sin = turned[:, index, first], turned[:, index, second]
        candidates = torch.cat([torch.zeros(1, dtype=torch.float64), *_frequencies(call.module)])
        for p in range(len(first)):
            size = torch.hypot(found_cos[:, p], found_sin[:, p])
            angle = positions[0].double()[:, None] * candidates
            error = torch.maximum(
                (angle.cos() * size[:, None] - found_cos[:, p, None]).abs(),
                (angle.sin() * size[:, None] - found_sin[:, p, None]).abs(),
            ).amax(0)
            best = int(error.argmin())
            if error[best] > TOLERANCE * max(1.0, float(size[0])) or (size - size[0]).abs().max() > TOLERANCE:
                return None
            frequency.append(float(candidates[best]))
            scale.append(float(size[0]))
        return cls._make(first, second, frequency, scale)

    @classmethod
    def _make(cls, first: list[int], second: list[int], frequency: list[float], scale: list[float]) -> Angles:
        made = cls(
            torch.tensor(first), torch.tensor(second), torch.tensor(frequency, dtype=torch.float64), torch.tensor(scale)
        )
        tensors = (made.first, made.second, made.frequency, made.scale)
        return _KNOWN.setdefault(tuple(x.numpy().tobytes() for x in tensors), made)


def signed_partners(rotation: Rotation, head_dim: int, rotary_dim: int) -> list[int] | None:
    """For every channel, 1 + its partner, negative if it is the pair's second; 0 where it does not turn.

    None if the function is not a rotation of pairs. A quarter turn takes the first of a pair to its second, and the
    second to minus the first.
    """
    if rotation.style == "none":
        return [0] * head_dim
    cos, sin = torch.zeros(1, head_dim, rotary_dim), torch.ones(1, head_dim, rotary_dim)
    turned = rotation.apply(torch.eye(head_dim)[None, None], cos, sin)[0, 0]
    signed = []
    for channel, row in enumerate(turned):
        where = row.nonzero().flatten().tolist()
        if len(where) != 1 or abs(float(row[where[0]])) != 1:
            return None
        if where[0] == channel:
            signed.append(0)
        else:
            signed.append((where[0] + 1) * (1 if row[where[0]] > 0 else -1))
    for channel, s in enumerate(signed):
        if s and signed[abs(s) - 1] != -(channel + 1) * (1 if s > 0 else -1):
            return None
    return signed


def pair_up(partner: list[int]) -> list[int]:
    """`partner` with the channels that have none (-1) paired: i with i + n/2 among them."""
    alone = [i for i, p in enumerate(partner) if p < 0]
    half = len(alone) // 2
    full = list(partner)
    for a, b in zip(alone[:half], alone[half:], strict=True):
        full[a], full[b] = b, a
    return full


def _changes(call: RotaryCall) -> bool:
    kind: Any = getattr(call.module, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(call.extra.get("layer_type"), "default")
    return kind in CHANGING


def _frequencies(module: torch.nn.Module) -> list[Tensor]:
    return [
        buffer.detach().double().cpu().flatten()
        for name, buffer in module.named_buffers()
        if "inv_freq" in name and "original" not in name
    ]
