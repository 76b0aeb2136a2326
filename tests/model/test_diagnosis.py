"""Figures of the diagnosis against plain loops, and its sentences for planted faults."""

import numpy as np
import pytest
import torch

from kvcalib.model.diagnosis import (
    LayerDiagnosis,
    advice,
    bias_median,
    key_outliers,
    offset_ratio,
    sink_share,
    value_outliers,
)


def sound(index=0, **changed):
    given = {
        "index": index, "key_bias": None, "offsets": torch.full((2, 16), 0.5), "sink": 0.01, "sink_by_head": [0.01] * 2,
        "key_outliers": [1e-4, 1e-4], "value_outliers": [1e-4, 1e-4],
    }  # fmt: skip
    return LayerDiagnosis(**(given | changed))


def test_offsets_are_mean_over_spread():
    x = torch.randn(500, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([1.0, 0.1, 2.0]) + torch.tensor([[0.0, 5.0, -1.0], [3.0, 0.0, 100.0]])
    found = offset_ratio(x.sum(0), x.square().sum(0), len(x))
    for h in range(2):
        for c in range(3):
            column = x[:, h, c].numpy()
            assert found[h, c] == pytest.approx(abs(column.mean()) / column.std(), rel=1e-6)


def test_a_channel_that_never_moves_is_all_offset_and_zero_is_none():
    x = torch.tensor([[2.0, 0.0]] * 10, dtype=torch.float64)
    found = offset_ratio(x.sum(0), x.square().sum(0), 10)
    assert found[0] > 1e5
    assert found[1] == 0


def test_outliers_by_head():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2, 16)) * np.arange(1, 17) + 7
    planted = rng.random((2000, 16)) < 0.01
    x[:, 1][planted] = 40 * 16
    keys, values = key_outliers(torch.from_numpy(x)), value_outliers(torch.from_numpy(x))
    for h in range(2):
        columns = x[:, h]
        far = [np.abs(columns[:, c] - columns[:, c].mean()) > 4 * columns[:, c].std() for c in range(16)]
        assert keys[h] == pytest.approx(np.mean(far))
        assert values[h] == pytest.approx(np.mean(np.abs(columns - columns.mean()) > 4 * columns.std()))
    assert keys[0] < 5e-4 < 8e-3 < keys[1]
    assert values[1] == pytest.approx(planted.mean())


def test_share_of_the_first_token():
    drawn = torch.tensor([[6.0, 1.0], [2.0, 3.0]])  # two sequences, two heads; 4 queries of groups of 2
    assert sink_share(drawn, 4, 2) == [0.5, 0.25]
    assert sink_share(drawn[:0], 4, 2) == []


def test_a_sound_model_is_left_alone():
    says = advice([sound(i) for i in range(4)])
    assert says[0] == "Nothing stands out: the default settings will do."
    assert "No key projection (k_proj) has a bias" in says[1]
    assert advice([sound(key_bias=20.0), sound(1, key_bias=30.0)]) == says[:1]


def test_qwens_bias_is_named_with_its_distance():
    layers = [sound(i, key_bias=norm) for i, norm in enumerate([605.0, 20.0, 22.0, 24.0, 921.0, 21.0, 22.0])]
    assert bias_median(layers) == 22.0
    says = advice(layers)
    assert len(says) == 2
    assert says[0].startswith("layer 0: key bias 605, 28 times the median of 22: per-channel offsets are needed")
    assert says[1].startswith("layer 4: key bias 921, 42 times")


def test_offsets_sinks_and_tails_are_named():
    offsets = torch.full((2, 16), 0.5)
    offsets[0, :8] = 9.0
    says = advice(
        [sound(0), sound(1, offsets=offsets), sound(2, sink=0.6), sound(3, sink=0.4, value_outliers=[0.02, 0.0])]
    )
    assert says[0].startswith("layer 1: up to 25 % of the key channels")
    assert "layers 2 and 3: the first token draws 60 % of the attention (layer 2)" in says[1]
    assert "--sinks" in says[1]
    assert "1 of 8 value heads have heavy tails, most of all layer 3, head 0: 2 %" in says[2]
    assert len(says) == 4
