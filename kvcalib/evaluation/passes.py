"""What every measure of a text does: batches, what each position predicts, the unquantized model's pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcalib.evaluation.trials import cache_bytes
from kvcalib.model.loading import input_device


def batches(model: PreTrainedModel, sequences: np.ndarray, size: int) -> Iterator[Tensor]:
    """`sequences [N, T]` (int64 token ids), `size` rows at a time, where the model wants them."""
    for start in range(0, len(sequences), size):
        yield token_ids(model, sequences[start : start + size])


def token_ids(model: PreTrainedModel, sequences: np.ndarray) -> Tensor:
    """`sequences [B, T]` (int64 token ids) where the model wants them."""
    return torch.from_numpy(np.ascontiguousarray(sequences)).long().to(input_device(model))


def total(x: Tensor) -> float:
    """Sum of `x` on the CPU, in an order that does not depend on the number of threads, as torch's own would."""
    return float(x.numpy().sum())


def next_tokens(ids: Tensor) -> Tensor:
    """The token that each position of `ids [B, T]` predicts, -1 for the last of a row, `[B, T]`."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-1)


@torch.no_grad()
def unquantized(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, float]:
    """Logits `[B, T, V]` of one pass over `ids [B, T]` on the model's own cache, and that cache's bytes per row."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    logits = model(input_ids=ids, past_key_values=cache).logits
    return logits, cache_bytes(cache) / len(ids)
