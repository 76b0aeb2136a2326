"""Rows whose heads are moved one by one: what belongs to which head in a token's row.

That takes ranks of outliers within a head, and a zero and scale for each head. Where nothing is kept exact by rank, a
token's one zero and scale can be stored once per head; ranks over all heads of a token cannot be split. Words that two
heads share are no obstacle: each head's bits are known.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcalib.quant.packing import PLANES
from kvcalib.quant.quantizer import Quantizer

_READERS: WeakKeyDictionary[Quantizer, Quantizer] = WeakKeyDictionary()
_BITS: WeakKeyDictionary[Quantizer, Tensor] = WeakKeyDictionary()


def separable(quantizer: Quantizer) -> bool:
    """Whether each head's part of a row can be moved without the others."""
    return quantizer.scope == "head" or not quantizer.outliers


def reader(quantizer: Quantizer) -> Quantizer:
    """What decodes rows in which zero and scale were stored for every head; made once, as tables hang on it."""
    if not quantizer.relative or quantizer.scope == "head":
        return quantizer
    if quantizer not in _READERS:
        _READERS[quantizer] = replace(quantizer, scope="head")
    return _READERS[quantizer]


def bits(quantizer: Quantizer) -> Tensor:
    """The bits of each word that carry a head's codes: int32 `[H, W]`; worked out once."""
    if quantizer in _BITS:
        return _BITS[quantizer]
    layout = quantizer.layout
    found = torch.zeros(len(layout.widths), layout.words, dtype=torch.int64)
    for head, channel in torch.cartesian_prod(*(torch.arange(n) for n in layout.widths.shape)).tolist():
        for plane, size in enumerate(PLANES[int(layout.widths[head, channel])]):
            word, shift = int(layout.word[plane, head, channel]), int(layout.shift[plane, head, channel])
            found[head, word] |= ((1 << size) - 1) << shift
    # As signed numbers, which words are.
    _BITS[quantizer] = torch.where(found >= 1 << 31, found - (1 << 32), found).int()
    return _BITS[quantizer]


def moved(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens `index [B, Hp, n]` of `tensor [B, S, Hp, ...]` (Hp > 1: each head its own), or, with Hp = 1, of
    `[B, S, ...]`: `[B, n, ...]`.
    """  # fmt: skip
    order = index.transpose(1, 2)
    if index.shape[1] == 1:
        flat = tensor.flatten(2)
        return flat.gather(1, order.expand(-1, -1, flat.shape[2])).view(*order.shape[:2], *tensor.shape[2:])
    flat = tensor.flatten(3) if tensor.ndim > 3 else tensor[..., None]
    chosen = flat.gather(1, order[..., None].expand(-1, -1, -1, flat.shape[3]))
    return chosen.view(*order.shape[:2], *tensor.shape[2:])


def moved_words(words: Tensor, index: Tensor, masks: Tensor) -> Tensor:
    """Tokens `index [B, H, n]`, each head its own, of `words [B, S, W]`; `masks` as `bits` gives them."""
    made = torch.zeros(words.shape[0], index.shape[2], words.shape[2], dtype=words.dtype, device=words.device)
    for head, mask in enumerate(masks):
        columns = mask.nonzero()[:, 0]
        mine = words[..., columns].gather(1, index[:, head, :, None].expand(-1, -1, len(columns)))
        made[..., columns] |= mine & mask[columns]
    return made
