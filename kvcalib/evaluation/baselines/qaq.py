"""`qaq-published`: a width for every token by the attention it draws, QAQ (arXiv 2403.04643) as its code has it (commit
f8d47e0).

Of each group (a token, or a token's head) the `outliers` are exact; R is the range and m the mean of the others. With T
tokens, the allowed error eps and a_g the most attention that any of the last n queries and of the group's heads pays:

    keys    E = sqrt(12 / q_norm ln(T^3 / (T - 1) eps^2 + 1))       one figure for all
    values  E = sqrt(12 / T) eps / a_g
    B = clamp(ceil(log2(R / (2 E) + 1)), lowest, highest);  the last n - 1 tokens get `highest`
    s = R / 2^B,   q = clamp(round((x - m) / s), -2^(B-1), 2^(B-1) - 1),   x^ = q s + m

Keys are stored after RoPE, and q_norm is 300 for every model, as there. The attention that decides is of exact new keys
over what is stored of older ones. The code quantizes one prompt and keeps what follows exact; here every pass is such a
prompt, of which T counts the real tokens so far, so a token decoded alone gets `highest` (n > 1). Widths follow from
which tokens came in one pass, and passes cut otherwise give others.

Other than that code: the prompt itself attends to what is stored; one token and constant groups work; a group has a
fixed number of outliers, also where several elements equal the last of them; m and R are rounded to two bytes before
codes are taken. Its level "token" (one group over all layers) needs all layers before any
can be stored and is left out. 0 bits, which decode to m - R / 2, occur only where 1 + R / 2E rounds to 1: there, in
float16, often, here below 2^-24.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvcalib.evaluation.baselines.baseline import Place, Settings, two_bytes
from kvcalib.evaluation.baselines.tapped import TappedBaseline
from kvcalib.evaluation.baselines.variable import Grouped, VariableTrack
from kvcalib.model.taps import Call
from kvcalib.quant.quantizer import saturate
from kvcalib.runtime.layers import TapLayer


class QaqSettings(Settings):
    """Settings of `qaq-published`."""

    error: float = Field(default=1.0, gt=0, description="eps, `target_quantization_error`; its grid: 1, 3, 10, 30.")
    lowest: int = Field(default=1, ge=0, le=8, description="`n_bits_min`; its grid: 0, 1, 2.")
    highest: int = Field(default=4, ge=0, le=8, description="`n_bits_max`; its grid: 2, 3, 4.")
    window: int = Field(default=5, ge=1, description="n, `last_n_attentions`.")
    outliers: float = Field(default=0.01, ge=0, lt=0.5, description="Share kept exact, half at either end.")
    level: Literal["head", "layer"] = Field(default="head", description="A group: a token's head, or the token.")
    q_norm: float = Field(default=300.0, gt=0, description="Stands for |q|^2.")

    @model_validator(mode="after")
    def _ordered(self) -> QaqSettings:
        if self.lowest > self.highest:
            raise ValueError(f"lowest is {self.lowest}, expected at most highest, which is {self.highest}")
        return self


def key_error(tokens: Tensor, eps: float, q_norm: float) -> Tensor:
    """E of keys, for `tokens [...]`; infinite for a single one."""
    count = tokens.double()
    growth = torch.where(count > 1, count**3 / (count - 1).clamp(min=1) * eps**2, math.inf)
    return (12 / q_norm * growth.log1p()).sqrt().float()


def value_error(tokens: Tensor, eps: float, attention: Tensor) -> Tensor:
    """E of values, for `tokens [...]` and the attention drawn, `[...]`."""
    return (12 / tokens.clamp(min=1).float()).sqrt() * eps / attention


def width(span: Tensor, error: Tensor, lowest: int, highest: int) -> Tensor:
    """B, int64, of ranges and errors `[...]`."""
    return (span / (2 * error) + 1).log2().ceil().clamp(lowest, highest).long()


def last_weights(query: Tensor, keys: Tensor, call: Call) -> Tensor:
    """Attention `[B, Hq, n, T]` that the last n queries `query [B, Hq, n, D]` pay to `keys [B, H, T, D]`."""
    count, total = query.shape[2], keys.shape[2]
    wide = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    scores = query.float() @ wide.transpose(2, 3) * call.scaling
    softcap, sink_logits = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if call.mask is None:
        future = torch.ones(count, total, dtype=torch.bool, device=query.device).triu(total - count + 1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        mask = call.mask[:, :, -count:]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sink_logits is not None:
        extra = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num()


class QaqLayer(TapLayer):
    """Rotated keys and values of one layer, a width for each group."""

    def __init__(self, place: Place, chosen: QaqSettings) -> None:
        super().__init__()
        self.place, self.chosen = place, chosen
        self._clear()

    def _clear(self) -> None:
        heads, channels = self.place.kv_heads, self.place.head_dim
        groups, size = (heads, channels) if self.chosen.level == "head" else (1, heads * channels)
        self.tracks = {role: VariableTrack(groups, size, self.chosen.outliers) for role in ("key", "value")}
        self.coming: tuple[Tensor, Tensor] | None = None
        self.real: Tensor | None = None
        self.is_initialized, self.seen, self.valid = False, 0, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take `[B, H, t, D]` for the `attend` that follows, which stores."""
        self.is_initialized = True
        self.seen += key_states.shape[2]
        return key_states, value_states

    def attend(self, call: Call, position_ids: Tensor) -> Tensor:
        """Choose widths, store, and attend to what is stored; `[B, Q, Hq, D]`."""
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        count = self._count(key)
        held = self.read("key", key.dtype)
        last = query[:, :, -self.chosen.window :]
        keys = key if held is None else torch.cat([held, key], 2)
        drawn = last_weights(last, keys, call)[..., -key.shape[2] :].amax(2)
        self.store(key, call.value, drawn, count)
        stored = [self.read(role, key.dtype) for role in ("key", "value")]
        assert stored[0] is not None
        assert stored[1] is not None
        return call.plain(query, stored[0], stored[1])[0]

    def _count(self, key: Tensor) -> Tensor:
        """Real tokens of each row so far, `[B]`."""
        batch, tokens = key.shape[0], key.shape[2]
        new = torch.full((batch,), tokens, device=key.device) if self.valid is None else self.valid.sum(1)
        self.real = new.int() if self.real is None else self.real + new.int()
        return self.real

    def store(self, key: Tensor, value: Tensor, drawn: Tensor, tokens: Tensor) -> None:
        """Store `[B, H, t, D]`, the most attention from any query `drawn [B, Hq, t]`, of rows of `tokens [B]`."""
        chosen, count = self.chosen, tokens.view(-1, 1, 1)
        groups = self.tracks["key"].groups
        attention = drawn.unflatten(1, (groups, -1)).amax(2).transpose(1, 2)
        errors = {
            "key": key_error(count, chosen.error, chosen.q_norm),
            "value": value_error(count, chosen.error, attention),
        }
        for role, x in (("key", key), ("value", value)):
            exact = two_bytes(x.dtype)
            x = saturate(x.detach(), exact).float().transpose(1, 2)
            found = Grouped(x.reshape(*x.shape[:2], groups, -1), chosen.outliers, exact)
            bits = width(found.range.float(), errors[role], chosen.lowest, chosen.highest)
            bits[:, max(0, bits.shape[1] - (chosen.window - 1)) :] = chosen.highest
            self.tracks[role].append(found, bits)

    def read(self, role: str, dtype: torch.dtype) -> Tensor | None:
        """All keys or values as stored, `[B, H, T, D]`; None before the first."""
        track = self.tracks[role]
        if not track.length:
            return None
        x = track.read().flatten(2).unflatten(-1, (self.place.kv_heads, self.place.head_dim))
        return x.transpose(1, 2).to(dtype)

    @property
    def batch(self) -> int:
        return 0 if self.real is None else len(self.real)

    def crop(self, tokens_to_remove: int) -> None:
        before = self.seen
        keep = self._crop_to(tokens_to_remove, self.seen)
        for track in self.tracks.values():
            track.crop(keep)
        if self.real is not None:
            self.real = (self.real - (before - keep)).clamp(min=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        for track in self.tracks.values():
            track.select(indices)
        if self.real is not None:
            self.real = self.real.index_select(0, indices.to(self.real.device))

    def reset(self) -> None:
        self._clear()

    def tensors(self) -> dict[str, Tensor]:
        held = {f"{role}.{name}": t for role, track in self.tracks.items() for name, t in track.tensors().items()}
        return held if self.real is None else held | {"tokens": self.real}


class QaqPublished(TappedBaseline):
    """See the module."""

    label = "qaq-published"
    source = "QAQ, arXiv 2403.04643, code of 2024-03"
    accepts = QaqSettings
    chosen: QaqSettings

    def layer(self, place: Place) -> Any:
        return QaqLayer(place, self.chosen)
