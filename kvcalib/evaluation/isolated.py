"""Isolated divergence: the keys or the values of one layer rounded, everything else exact.

A measuring handler sits where the packed cache would: it sends one layer's un-rotated keys (or values) through the
storage quantizer, `decode(encode(x))`, outliers, zeros and scales included, and hands them to the model's own
attention. What attention reads is what a packed cache would give back, up to the model's dtype, to which it is rounded
(in float32 nothing, in bfloat16 2^-9 of an element). The other role and all other layers are exact to the bit, which a
packed layer of 8 bits would not be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.evaluation.divergence import compare_logits
from kvcalib.model.rotary import Rotation
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps
from kvcalib.quant.quantizer import Quantizer

CHUNK = 4096
"""Tokens that are encoded at a time."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One measurement: which layer and role ("key" or "value") is rounded, and through what.

    Attributes:
        sinks: first tokens of a sequence that stay exact.
    """

    layer: int
    role: str
    quantizer: Quantizer
    sinks: int = 0


class _Rounding:
    """Handler that rounds what `probe` says."""

    def __init__(self) -> None:
        self.probe: Probe | None = None

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention, over rounded keys or values in the probed layer."""
        key, value, probe = call.key, call.value, self.probe
        if probe is not None and probe.layer == call.tap.layer:
            if probe.role == "key":
                key = rounded(key, probe)
            else:
                value = rounded(value, probe)
        return call.plain(call.rotate_new(call.query), call.rotate_new(key), value)


def rounded(x: Tensor, probe: Probe) -> Tensor:
    """`x [B, H, T, D]` as it comes back from storage, its first `probe.sinks` tokens as they were."""
    exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    batch, heads, tokens, dim = x.shape
    rows = x.transpose(1, 2).reshape(-1, heads, dim)
    parts = [probe.quantizer.round_trip(part, exact) for part in rows.split(CHUNK)]
    stored = torch.cat(parts).to(x.dtype).view(batch, tokens, heads, dim).transpose(1, 2)
    return torch.cat([x[:, :, : probe.sinks], stored[:, :, probe.sinks :]], 2)


def isolated_kl(
    model: PreTrainedModel, rotations: dict[int, Rotation], ids: Tensor, probes: Iterable[Probe]
) -> Iterator[tuple[Probe, list[float]]]:
    """KL(unquantized || rounded) of every probe, summed over the tokens of each row of `ids [B, T]`, in nats.

    The model is tapped until the last probe is done.

    Args:
        rotations: of all probed layers, as `runtime.loader.prove` returns them.
    """
    handler = _Rounding()
    nothing = torch.full((ids.numel(),), -1)
    with torch.no_grad(), Taps(model, handler, rotations) as taps:
        with taps.bypass():
            expected = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        for probe in probes:
            handler.probe = probe
            found = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            kld = compare_logits(expected, found, nothing)["kld"]
            # Rounding of float32 can leave a divergence of nothing a hair below 0.
            yield probe, kld.view(ids.shape).sum(1).clamp(min=0).tolist()
