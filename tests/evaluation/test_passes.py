import numpy as np
import torch

from kvcalib.evaluation.passes import batches, next_tokens, unquantized
from tests.tiny import tiny_llama, tokens


def test_batches_hold_every_row_once():
    ids = tokens(5, 7).numpy()[:, ::-1]  # not contiguous
    parts = list(batches(tiny_llama(), ids, 2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.cat(parts).tolist() == ids.tolist()
    assert parts[0].dtype == torch.int64


def test_each_position_predicts_the_next():
    assert next_tokens(torch.tensor([[5, 6, 7], [1, 2, 3]])).tolist() == [[6, 7, -1], [2, 3, -1]]


def test_the_unquantized_pass_is_the_models_own():
    model, ids = tiny_llama(), tokens(3, 11)
    logits, held = unquantized(model, ids)
    assert torch.equal(logits, model(ids).logits)
    assert not logits.requires_grad
    assert held == 2 * 2 * np.prod([2, 11, 32])  # two layers, keys and values, 2 bytes an element
