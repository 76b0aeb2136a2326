"""What is collected while a batch runs forward and back: the handler of the pass.

Sums live where their layer lives; they are small. Of the sampled tokens nothing stays in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcalib.calibration.attention import BlockAttention, Drawn, drawn_attention
from kvcalib.calibration.part import Part
from kvcalib.calibration.statistics import LayerShape, lower_triangle, norm_histogram
from kvcalib.calibration.sums import Sums
from kvcalib.errors import NonFiniteActivations
from kvcalib.model.angles import pair_up, signed_partners
from kvcalib.model.offloaded import elements
from kvcalib.model.taps import AttentionOutput, Call, Tap


class Collector:
    """Handler of the pass: sums of every tapped layer, and its sampled tokens, which go to `part` as they come.

    Args:
        window: queries of the windowed attention maximum. sliding: tokens that a query of each layer sees, None for
            all. part: where the pass goes on; what is done there counts.
    """

    def __init__(self, window: int, sliding: Mapping[int, int | None], part: Part) -> None:
        self.window, self.sliding, self.part = window, sliding, part
        self.sums = Sums(part.sums(), len(part.done))
        self.shapes = {shape.index: shape for shape in part.layers}
        self.row = self.token = torch.empty(0, dtype=torch.long)
        self.seen: set[int] = set()

    def start(self, row: Tensor, token: Tensor) -> None:
        """A new batch, of which the tokens `(row, token)` are kept."""
        self.row, self.token = row, token
        self.seen.clear()
        self.part.begin(len(row))

    def commit(self, batch: int) -> None:
        """The batch is complete."""
        self.sums.close()
        self.part.commit(batch, self.sums.tensors(), [self.shapes[i] for i in sorted(self.shapes)])

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """Attention of one layer, and what is collected of it."""
        layer = call.tap.layer
        if torch.is_grad_enabled():
            # In the first tapped layer nothing upstream needs gradients, so keys and values are where they end.
            for x in (call.key, call.value):
                if not x.requires_grad:
                    x.requires_grad_(True)
            call.key.register_hook(lambda g: self._gradient(layer, "key", g))
            call.value.register_hook(lambda g: self._gradient(layer, "value", g))
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        drawn = None
        if _is_plain(call):
            out, *tensors = BlockAttention.apply(query, key, call.value, call.scaling, self.window)
            drawn = Drawn(*tensors)
        # Gradient checkpointing runs the forward pass twice.
        if layer not in self.seen:
            self.seen.add(layer)
            with torch.no_grad():
                if drawn is None:
                    drawn = drawn_attention(
                        query,
                        key,
                        call.scaling,
                        self.window,
                        call.kwargs.get("softcap"),
                        call.kwargs.get("s_aux"),
                        self.sliding[layer],
                    )
                self._forward(call, drawn)
        return (out.transpose(1, 2), None) if _is_plain(call) else call.plain(query, key, call.value)

    def _forward(self, call: Call, drawn: Drawn) -> None:
        layer = call.tap.layer
        if layer not in self.shapes:
            self.shapes[layer] = _shape(call, self.sliding[layer])
        for role, x in (("key", call.key), ("value", call.value)):
            flat = x.detach().float()
            total = flat.sum((0, 2), dtype=torch.float64)
            self._check(layer, "forward pass", role, total)
            self.sums.add(f"layers.{layer}.{role}.sum", total)
            self.sums.add(f"layers.{layer}.{role}.square_sum", flat.square().sum((0, 2), dtype=torch.float64))
            self._keep(f"layers.{layer}.sample.{role}", x.detach().transpose(1, 2))
        raw = call.query.detach().float()
        grouped = raw.reshape(raw.shape[0], call.key.shape[1], -1, raw.shape[3])
        self.sums.add(f"layers.{layer}.query.outer", (grouped.transpose(2, 3) @ grouped).double().sum(0))
        squared = raw.square().sum(-1).transpose(0, 1).flatten(1)
        self.sums.add(f"layers.{layer}.query.norm_histogram", norm_histogram(squared))
        self.sums.add(f"layers.{layer}.attention.peak_sum", drawn.peak.sum((0, 2), dtype=torch.float64))
        self.sums.add(f"layers.{layer}.attention.peak_square_sum", drawn.peak.square().sum((0, 2), dtype=torch.float64))
        self._keep(f"layers.{layer}.sample.attention_sum", drawn.total.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_peak", drawn.peak.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_late", drawn.late.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_early", drawn.early.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_later_square", drawn.square.transpose(1, 2))
        self.part.put(f"layers.{layer}.sample.attention_slope", self._turned_back(call, drawn.slope))

    def _turned_back(self, call: Call, slope: Tensor) -> Tensor:
        """The sampled tokens' `slope [B, H, T, D]` with respect to the un-rotated key, `[n, H, D]` bfloat16."""
        row, token = self.row.to(slope.device), self.token.to(slope.device)
        kept = slope[row, :, token]
        cos, sin = call.tap.cos, call.tap.sin
        if cos is not None and sin is not None:
            angles = (x.float().expand(slope.shape[0], -1, -1)[row, token][:, None] for x in (cos, sin.neg()))
            # The transpose of a rotation is the rotation the other way.
            kept = call.tap.rotation.apply(kept[:, :, None], *angles)[:, :, 0]
        return kept.to(torch.bfloat16)

    def _gradient(self, layer: int, role: str, gradient: Tensor) -> None:
        raw = gradient.detach().float()
        total = raw.square().sum((0, 2), dtype=torch.float64)
        self._check(layer, "backward pass", f"gradient of the {role}", total)
        self.sums.add(f"layers.{layer}.{role}.fisher_sum", total)
        outer = (raw.transpose(2, 3) @ raw).double().sum(0)
        self.sums.add(f"layers.{layer}.{role}.fisher_outer", lower_triangle(outer))
        self._keep(f"layers.{layer}.sample.{role}_gradient", raw.transpose(1, 2))

    def _check(self, layer: int, stage: str, what: str, total: Tensor) -> None:
        # One NaN or infinity anywhere makes the sum one too; looking at every element would cost a pass of its own.
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteActivations(
                f"fisher: layer {layer}: the {what} of the {stage} has NaN or infinite elements; "
                "try --dtype float32 or bfloat16, and check the model's weights"
            )

    def _keep(self, name: str, x: Tensor) -> None:
        """Keep this batch's sampled tokens of `x [B, T, ...]`."""
        self.part.put(name, x[self.row.to(x.device), self.token.to(x.device)])


def _is_plain(call: Call) -> bool:
    """Whether `BlockAttention` computes this call: causal softmax attention in float32, on a CPU."""
    ordinary = call.mask is None and call.kwargs.get("softcap") is None and call.kwargs.get("s_aux") is None
    return ordinary and call.query.device.type == "cpu" and call.query.dtype == torch.float32


def _shape(call: Call, sliding: int | None) -> LayerShape:
    head_dim = call.key.shape[3]
    cos = call.tap.cos
    signed = signed_partners(call.tap.rotation, head_dim, head_dim if cos is None else cos.shape[-1])
    biased = getattr(getattr(call.tap.module, "k_proj", None), "bias", None) is not None
    return LayerShape(
        index=call.tap.layer,
        query_heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.key.shape[3],
        key_bias_norm=float(elements(call.tap.module, "k_proj.bias").float().norm()) if biased else None,
        sliding=sliding,
        partner=pair_up([abs(s) - 1 for s in signed or [0] * head_dim]),
        scaling=float(call.scaling),
    )
