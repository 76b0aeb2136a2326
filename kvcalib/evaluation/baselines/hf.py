"""transformers' quantized cache layers, made to show their error: what `hf-hqq` and `hf-quanto` share.

transformers' `QuantizedLayer.update` returns a prompt as it came, and later tokens as they came until they are next
quantized, so a perplexity in one pass through it is the unquantized model's. Here `update` returns what is stored after
it: everything quantized, and the residual. When the residual is full, transformers dequantizes all tokens and quantizes
them again with the new ones; that is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers.cache_utils import QuantizedLayer

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines.baseline import Baseline, Place, Settings


class HfSettings(Settings):
    """Settings of transformers' quantized caches, by its defaults."""

    bits: int = Field(default=4, description="`nbits`.")
    group: int = Field(default=64, ge=1, description="`q_group_size`: numbers that share scale and zero.")
    residual: int = Field(default=128, ge=1, description="`residual_length`: new tokens kept exact until so many came.")
    key_axis: int = Field(default=0, description="`axis_key`.")
    value_axis: int = Field(default=0, description="`axis_value`.")


class ShownLayer(QuantizedLayer):
    """Mixed in before one of transformers' layers: attention reads what is stored."""

    is_croppable = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        key, value = self._dequantize(self._quantized_keys), self._dequantize(self._quantized_values)
        key, value = self._apply_pending_reorder(key, value)
        if self.keys is not None and self.values is not None and self.keys.numel():
            key, value = torch.cat([key, self.keys], -2), torch.cat([value, self.values], -2)
        return key.to(key_states.dtype), value.to(value_states.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """transformers cannot crop these layers (it would take tokens off the residual alone)."""
        if tokens_to_remove:
            raise NotImplementedError(
                "transformers' quantized caches cannot be cropped; decode without an assistant or take another baseline"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        self.reorder_cache(indices)

    def _rows(self) -> int:
        return self._dequantize(self._quantized_keys).shape[0] if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: codes, scales, zeros and residual; floating point ones count at 16 bits."""
        held = (self._quantized_keys, self._quantized_values, self.keys, self.values, self._pending_beam_idx)
        return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in plain_tensors(held))


def plain_tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and tensor subclasses."""
    if isinstance(x, Tensor):
        if hasattr(x, "__tensor_flatten__") and type(x) is not Tensor:
            for name in x.__tensor_flatten__()[0]:
                yield from plain_tensors(getattr(x, name))
        else:
            yield x
    elif isinstance(x, dict):
        yield from plain_tensors(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from plain_tensors(part)


class HfBaseline(Baseline):
    """Base of both.

    Attributes:
        package: what it needs, of the extra [bench].
        widths, axes: what `bits` and the axes may be.
    """

    package: ClassVar[str]
    widths: ClassVar[tuple[int, ...]]
    axes: ClassVar[tuple[int, ...]]
    chosen: HfSettings

    @abstractmethod
    def make(self, **kwargs: Any) -> Any:
        """The layer, told what transformers' is."""

    @staticmethod
    @abstractmethod
    def available() -> bool:
        """Whether the package is installed, in a version that transformers takes."""

    def layer(self, place: Place) -> Any:
        chosen = self.chosen
        if not self.available():
            raise InputError(
                f"baseline {self.label!r} needs the package {self.package}, which is not installed or too old; run "
                "pip install 'kvcalib[bench]'"
            )
        if chosen.bits not in self.widths:
            raise InputError(f"baseline {self.label!r}: bits is {chosen.bits}, expected one of {self.widths}")
        for name in ("key_axis", "value_axis"):
            if getattr(chosen, name) not in self.axes:
                raise InputError(
                    f"baseline {self.label!r}: {name} is {getattr(chosen, name)}, expected one of {self.axes}"
                )
        if place.kv_heads * place.head_dim % chosen.group:
            raise InputError(
                f"baseline {self.label!r}: group is {chosen.group}, and a token of this model has "
                f"{place.kv_heads} x {place.head_dim} channels, not a multiple; take a group that divides them"
            )
        return self.make(
            nbits=chosen.bits,
            axis_key=chosen.key_axis,
            axis_value=chosen.value_axis,
            q_group_size=chosen.group,
            residual_length=chosen.residual,
        )
