"""Small floating-point formats that inference engines keep a KV cache in: FP8 e4m3 and NVFP4.

FP8 e4m3 (OCP 8-bit floating point, "e4m3fn"): 4 bits of exponent, 3 of mantissa, largest number 448, no infinity; one
scale per tensor, `x^ = scale * e4m3(x / scale)`, saturating. NVFP4: blocks of 16 numbers in e2m1 (0, 0.5, 1, 1.5, 2, 3,
4, 6 and their negatives), one e4m3 scale per block and one float32 scale per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_BLOCK = 16
BITS = {"FP8": 8.0, "NVFP4": 4 + 8 / NVFP4_BLOCK}
"""Bits per element, scales of blocks included."""
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MARGIN = 1.5
"""A scale leaves room for at least this many times the largest magnitude seen: yarn and longrope multiply rotated keys
by up to about 1.4, and the calibration has not seen every token. e4m3 loses next to nothing by it (docs/exports.md)."""
OCTAVES, STEPS = 2, 4
"""Scales up to 2^2 times the least one are tried, 4 to the octave."""
FLAT = 1.01
"""Of scales whose error is within this factor of the least, the largest is taken."""


def fp8(x: Tensor, scale: float) -> Tensor:
    """`x` rounded to e4m3 under one scale, saturating, as float32."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def nvfp4(x: Tensor, largest: float) -> Tensor:
    """`x [..., D]` rounded to NVFP4 in blocks of 16 along D, as float32; a last block may be shorter.

    Args:
        largest: the largest magnitude that the tensor's scale, `largest / (6 * 448)`, must reach.
    """
    x = x.float()
    if largest <= 0:
        return torch.zeros_like(x)
    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -width % NVFP4_BLOCK)).unflatten(-1, (-1, NVFP4_BLOCK))
    tensor_scale = largest / (E2M1_MAX * E4M3_MAX)
    scale = fp8(blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * tensor_scale), 1.0) * tensor_scale
    normal = torch.where(scale > 0, blocks / torch.where(scale > 0, scale, 1.0), 0.0)
    levels = _E2M1.to(x.device)
    middle = (levels[1:] + levels[:-1]) / 2
    magnitude = normal.abs()
    # The two differ only halfway between two levels, where the even code is taken, as IEEE rounding does.
    low, high = torch.bucketize(magnitude, middle), torch.bucketize(magnitude, middle, right=True)
    code = torch.where(low % 2 == 0, low, high)
    return (levels[code] * normal.sign() * scale).flatten(-2)[..., :width]


def turn(keys: Tensor, partner: Sequence[int], generator: torch.Generator) -> Tensor:
    """`keys [n, H, D]` before RoPE, every pair of channels turned by an angle of its own, uniform in 0 .. 2 pi.

    Which positions a key will be read at is not known; the norm of a pair is, and no rotation changes it. Channels that
    are their own partner do not turn.
    """
    first = torch.tensor([i for i, p in enumerate(partner) if i < p], dtype=torch.long)
    second = torch.tensor([p for i, p in enumerate(partner) if i < p], dtype=torch.long)
    angle = 2 * torch.pi * torch.rand(*keys.shape[:-1], len(first), generator=generator)
    turned = keys.float().clone()
    a, b = turned[..., first], turned[..., second]
    turned[..., first] = a * angle.cos() - b * angle.sin()
    turned[..., second] = b * angle.cos() + a * angle.sin()
    return turned


def reach(keys: Tensor, partner: Sequence[int]) -> float:
    """The largest magnitude that any rotation can give an element of `keys [..., D]`: the norm of its pair."""
    x = keys.float()
    other = x[..., torch.tensor(list(partner), dtype=torch.long)]
    alone = torch.tensor([i == p for i, p in enumerate(partner)])
    return float(torch.where(alone, x.abs(), (x.square() + other.square()).sqrt()).max())


def loss(x: Tensor, rounded: Tensor, fisher: Tensor) -> float:
    """Predicted loss of rounding, nats per token: half the mean over tokens of sum F (x - x^)^2; all `[n, H, D]`."""
    return float((fisher.double() * (x.double() - rounded.double()).square()).sum() / (2 * max(1, len(x))))


def fp8_scale(tensors: Sequence[tuple[Tensor, Tensor]], largest: float) -> tuple[float, float]:
    """One FP8 scale for all `tensors`, pairs of values and Fisher `[n, H, D]`, and the predicted loss under it.

    The scale lets at least `MARGIN * largest` be stored without saturating. e4m3 is a float, so its error hardly
    depends on the scale: of the scales whose predicted loss is within 1 % of the least, the largest is taken, which
    leaves the most room for tokens that the calibration has not seen.

    Raises:
        ValueError: `largest` is not finite or is negative.
    """
    if not 0 <= largest < float("inf"):
        raise ValueError(f"largest is {largest}, expected a finite magnitude")
    if largest == 0:
        return 1.0, 0.0
    scales = [MARGIN * largest / E4M3_MAX * 2 ** (step / STEPS) for step in range(OCTAVES * STEPS + 1)]
    losses = [sum(loss(x, fp8(x, scale), fisher) for x, fisher in tensors) for scale in scales]
    best = max(k for k, found in enumerate(losses) if found <= FLAT * min(losses))
    return scales[best], losses[best]
