"""`qhitter-published`: Q-Hitter (MLSys 2024) as its authors' code has it (commit 0e851a5): 20 % of tokens in 4 bits.

Of every head and token (group: the head's D channels), after RoPE:

    s = max(max - min, 1e-5) / (2^b - 1),    z = clamp(-round(min / s), 0, 2^b - 1)
    q = clamp(round(x / s) + z, 0, 2^b - 1),    x^ = (q - z) s

Which tokens stay is for `runtime/policies/qhitter_published.py`: of a prompt the last 5 %, 7 % by attention alone and
8 % by attention and friendliness. The unsigned z is kept: a row that is all positive, or all negative, is clipped.

Other than that code: what `qhitter_published.py` lists, and attention reads stored keys (there exact ones form the
prompt's weights). As all of kvcalib's eviction, the prompt is read whole and tokens leave when decoding begins or
`cache.evict()` is called, so one pass over a text shows the quantization alone, and its bytes are those of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvcalib.evaluation.baselines.baseline import Place, Settings
from kvcalib.evaluation.baselines.tapped import TappedBaseline
from kvcalib.model.taps import Call
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer, Rows, saturate
from kvcalib.runtime.attention import chunked_attention, drawn_attention
from kvcalib.runtime.evicting import EvictingLayer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.layers import ROLES, chunks, residue
from kvcalib.runtime.policies import QHitterPublished as Policy


class QhitterSettings(Settings):
    """Settings of `qhitter-published`."""

    bits: int = Field(default=4, ge=1, le=8, description="`kbits` and `vbits`.")
    keep: float = Field(default=0.2, gt=0, le=1, description="Share of the prompt's tokens that stay, recent ones too.")
    recent: float = Field(default=0.05, ge=0, lt=1, description="`recent_size`.")
    alpha: float = Field(default=0.5, ge=0, le=1, description="Weight of attention; 1: H2O with quantization.")

    @model_validator(mode="after")
    def _shares(self) -> QhitterSettings:
        Eviction(self.keep, self.recent, "qhitter-published")
        return self


class ClampedQuantizer(Quantizer):
    """Integers with an unsigned zero point, per token and head; `zero` holds z and `scale` s."""

    @classmethod
    def of(cls, place: Place, bits: int) -> ClampedQuantizer:
        """For keys or values of one layer."""
        widths = torch.full((place.kv_heads, place.head_dim), bits, dtype=torch.uint8)
        levels = torch.arange(1 << bits, dtype=torch.float32).expand(*widths.shape, -1)
        return cls(Codebook(widths, levels), Layout.build(widths), True, "head", 0, torch.ones(widths.shape))

    @property
    def most(self) -> int:
        """2^b - 1."""
        return self.codebook.centroids.shape[-1] - 1

    def encode(self, x: Tensor, exact_dtype: torch.dtype) -> Rows:
        x = x.float()
        low, high = x.amin(-1), x.amax(-1)
        scale = saturate((high - low).clamp(min=1e-5) / self.most, exact_dtype)
        wide = scale.float()
        # 1e-5 over 15 is no number of float16 that one can divide by.
        wide = torch.where(wide > 0, wide, 1.0)
        zero = (-(low / wide).round()).clamp(0, self.most)
        codes = ((x / wide[..., None]).round() + zero[..., None]).clamp(0, self.most)
        return {"words": self.layout.pack(codes.int()), "zero": zero.to(exact_dtype), "scale": scale}

    def decode(self, rows: Rows) -> Tensor:
        codes = self.layout.unpack(rows["words"])
        return (codes - rows["zero"].float()[..., None]) * rows["scale"].float()[..., None]


class QhitterLayer(EvictingLayer):
    """An evicting layer that stores rotated keys, through `ClampedQuantizer`s."""

    def attend(self, call: Call, position_ids: Tensor, exact: bool = False) -> Tensor:
        """Rotate what came, then store, let go and read as any evicting layer."""
        assert self.coming is not None
        _, value, valid = self.coming
        self.coming = (call.rotate_new(call.key).detach(), value, valid)
        return super().attend(call, position_ids)

    def _store(self, new: Any) -> None:
        batch, count = new["key"].shape[:2]
        exact = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        self.packed.extend(self._spec(batch, count, exact))
        rows = self.packed.read(self.packed.length - count, self.packed.length)
        residues = self._residues(new["key"])
        for role in ROLES:
            x = new[role].flatten(0, 1)
            made = self.quantizers[role].encode(x, exact)
            for name, t in made.items():
                rows[f"{role}.{name}"].copy_(t.view(batch, count, *t.shape[1:]))
            if residues:
                residues[role].copy_(residue(self.quantizers[role], made, x).view(batch, count, -1, 2))
        if residues:
            self._note(rows, residues)

    def _read(self, call: Call, exact: bool, apart: bool) -> Tensor:
        view = self.view(self.slots, self._positions())
        query, softcap = call.rotate_new(call.query), call.kwargs.get("softcap")
        sums: list[Tensor] = []
        out = chunked_attention(
            query, chunks(view), lambda keys, start: keys, call.mask, view.total, call.scaling, softcap,
            call.kwargs.get("s_aux"), log_sums=sums,
        )  # fmt: skip
        drawn = torch.empty(self.batch, len(self.quantizers["key"].layout.widths), self.slots, device=self.device)
        drawn_attention(
            query,
            chunks(view),
            lambda keys, start: keys,
            call.mask,
            view.total,
            call.scaling,
            softcap,
            sums,
            1.0,
            drawn,
        )
        self.marks.read(0, self.slots)["drawn"].transpose(1, 2).add_(drawn)
        return out


class QhitterPublished(TappedBaseline):
    """See the module."""

    label = "qhitter-published"
    source = "Q-Hitter, MLSys 2024, code of 2024-06"
    accepts = QhitterSettings
    evicts = True
    chosen: QhitterSettings

    def layer(self, place: Place) -> Any:
        chosen = self.chosen
        eviction = Eviction(chosen.keep, chosen.recent, Policy(chosen.alpha), per="head")
        key, value = (ClampedQuantizer.of(place, chosen.bits) for _ in ROLES)
        return QhitterLayer(key, value, eviction)
