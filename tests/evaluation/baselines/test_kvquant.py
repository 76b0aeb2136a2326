import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import Calibrated, LayerSample, find
from kvcalib.evaluation.baselines.baseline import Place

PLACE = Place(0, 2, 16)
CHANNELS = 32


def sample(tokens=300, seed=0):
    """Keys whose channels differ in place and spread, values, and Fisher; positions count up in sequences of 50."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(tokens, 2, 16, generator=generator) * (torch.rand(2, 16, generator=generator) * 3 + 0.2)
    key += torch.randn(2, 16, generator=generator) * 2
    value = torch.randn(tokens, 2, 16, generator=generator)
    fisher = [torch.rand(tokens, 2, 16, generator=generator) ** 4 for _ in range(2)]
    return Calibrated({0: LayerSample(key, value, *fisher)}, torch.arange(tokens) % 50, "the test")


def flat(x):
    return x.flatten(1).double().numpy()


def kmeans(normal, weight, bits):
    """scikit-learn's as the code calls it; centres ascending."""
    model = KMeans(2**bits, random_state=0, n_init="auto", max_iter=50).fit(normal[:, None], sample_weight=weight)
    return np.sort(model.cluster_centers_[:, 0])


def key_recipe(calibrated, bits, outliers, sinks=0):
    """Thresholds (1, C) and the codebook of `SimQuant.quantize`, qchannel=0."""
    x, fisher = flat(calibrated.layers[0].key), flat(calibrated.layers[0].key_fisher)
    q = 1 - outliers / 2
    upper = np.array([np.percentile(x[:, c], 100 * q) for c in range(CHANNELS)])
    lower = np.array([np.percentile(x[:, c], 100 * (1 - q)) for c in range(CHANNELS)])
    normal = (x - (upper + lower) / 2) / ((upper - lower) / 2)
    inlier = np.abs(normal) <= 1
    seen = inlier & (calibrated.position.numpy() >= sinks)[:, None]
    return lower, upper, kmeans(normal[seen], fisher[seen], bits), normal[inlier]


def value_recipe(calibrated, bits, outliers):
    """The codebook of `SimQuant.quantize`, qchannel=-1."""
    x, fisher = flat(calibrated.layers[0].value), flat(calibrated.layers[0].value_fisher)
    q = 1 - outliers / 2
    normal = np.zeros_like(x)
    for t, row in enumerate(x):
        u, low = np.percentile(row, 100 * q), np.percentile(row, 100 * (1 - q))
        normal[t] = (row - (u + low) / 2) / ((u - low) / 2)
    inlier = np.abs(normal) <= 1
    return kmeans(normal[inlier], fisher[inlier], bits)


def spoken(bits=2, outliers=0.1, **more):
    parts = {"bits": bits, "outliers": outliers} | more
    return "kvquant-published:" + ":".join(f"{n}={v}" for n, v in parts.items())


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_key_codes_and_outliers_are_those_of_the_published_code(bits, outliers):
    calibrated = sample()
    layer = find(spoken(bits, outliers), calibrated).layer(PLACE)
    x = (sample(7, seed=5).layers[0].key * 1.3).half().float()
    key, _ = layer.update(*[x.transpose(0, 1)[None]] * 2)
    track = layer.tracks["key"]
    codes = track.codec.layout.unpack(track.packed.read(0, 7)["words"])[0].flatten(1).numpy()
    lower, upper, book, _ = key_recipe(calibrated, bits, outliers)
    lower, upper = np.float16(lower), np.float16(upper)
    zero, half = np.float32((upper + lower) / 2), np.float32((upper - lower) / 2)
    count = 0
    for t, c in np.ndindex(7, CHANNELS):
        y = np.float32(x.flatten(1)[t, c])
        code = int(np.argmin(np.abs((y - zero[c]) / half[c] - book)))
        assert codes[t, c] == code
        found = float(key[0].transpose(0, 1).flatten(1)[t, c])
        if outliers and (y < lower[c] or y > upper[c]):
            count += 1
            assert found == y
        else:
            assert found == pytest.approx(zero[c] + half[c] * book[code], abs=1e-4)
    assert len(track.outliers) == count
    assert not outliers or count > 10


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_value_codes_and_outliers_are_those_of_the_published_code(bits, outliers):
    calibrated = sample()
    layer = find(spoken(bits, outliers), calibrated).layer(PLACE)
    x = sample(6, seed=3).layers[0].value.half().float()
    _, value = layer.update(*[x.transpose(0, 1)[None]] * 2)
    track = layer.tracks["value"]
    codes = track.codec.layout.unpack(track.packed.read(0, 6)["words"])[0].flatten(1).numpy()
    book = value_recipe(calibrated, bits, outliers)
    outside = 0
    for t, row in enumerate(x.flatten(1)):
        exact = torch.zeros(CHANNELS, dtype=torch.bool)
        if outliers:
            exact = (row <= torch.quantile(row, outliers / 2)) | (row >= torch.quantile(row, 1 - outliers / 2))
        inliers = [float(torch.median(row)) if out else float(v) for v, out in zip(row, exact, strict=True)]
        zero = np.float32(np.float16((np.float32(max(inliers)) + np.float32(min(inliers))) / 2))
        half = np.float32(np.float16((np.float32(max(inliers)) - np.float32(min(inliers))) / 2))
        outside += int(exact.sum())
        for c in range(CHANNELS):
            code = int(np.argmin(np.abs((np.float32(row[c]) - zero) / half - book)))
            assert codes[t, c] == code
            expected = float(row[c]) if exact[c] else zero + half * book[code]
            assert float(value[0].transpose(0, 1).flatten(1)[t, c]) == pytest.approx(expected, abs=1e-4)
    assert len(track.outliers) == outside
    assert not outliers or outside == 6 * 4, "torch.quantile of 32 at 5 % lies between the second and third"


def test_qnorm_gives_back_mean_and_deviation_of_inliers():
    calibrated = sample()
    codec = find(spoken(2, 0.1, qnorm="true"), calibrated).layer(PLACE).tracks["key"].codec
    _, _, book, inliers = key_recipe(calibrated, 2, 0.1)
    rounded = book[np.abs(inliers[:, None] - book).argmin(1)]
    scale = inliers.std() / rounded.std()
    expected = book * scale + inliers.mean() - rounded.mean() * scale
    assert codec.back.numpy() == pytest.approx(expected, abs=1e-4)
    assert codec.middles.numpy() == pytest.approx((book[1:] + book[:-1]) / 2, abs=1e-4), "codes by the plain book"
    moved = expected[np.abs(inliers[:, None] - book).argmin(1)]
    assert (moved.mean(), moved.std()) == pytest.approx((inliers.mean(), inliers.std()))


def test_sinks_are_exact_and_left_out_of_the_codebook_but_not_of_thresholds():
    calibrated = sample()
    layer = find(spoken(2, 0.0, sinks=3), calibrated).layer(PLACE)
    lower, _, book, _ = key_recipe(calibrated, 2, 0.0, sinks=3)
    codec = layer.tracks["key"].codec
    assert codec.middles.numpy() == pytest.approx((book[1:] + book[:-1]) / 2, abs=1e-4)
    assert np.array_equal(codec.lower.numpy(), np.float16(lower))
    x = torch.randn(2, 2, 6, 16).half().float()
    valid = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    layer.note(valid)
    key, value = layer.update(x, -x)
    exact = (key == x).all(-1).all(1) & (value == -x).all(-1).all(1)
    assert exact.tolist() == [[False, False, True, True, True, False], [True, True, True, False, False, False]]


def test_bytes_by_hand():
    """5 tokens of 32 channels at 2 bits: 2 words, a pointer of 4, an outlier 4; values also zero and range of 2."""
    layer = find(spoken(2, 0.1), sample()).layer(PLACE)
    x = torch.randn(1, 2, 5, 16) * 4
    key, value = layer.update(x, x)
    x = x.half().float()
    exact = int((key == x).sum() + (value == x).sum())
    assert exact > 20
    assert layer.nbytes == 5 * 2 * (2 * 4 + 4) + 5 * 4 + exact * 4
    dense = find(spoken(2, 0.0), sample()).layer(PLACE)
    dense.update(x, x)
    assert dense.nbytes == 5 * 2 * 2 * 4 + 5 * 4


def test_crop_and_select_move_outliers_along():
    layer = find(spoken(2, 0.1, sinks=1), sample()).layer(PLACE)
    x = torch.randn(3, 2, 9, 16) * 3
    layer.update(x[:, :, :4], x[:, :, :4])
    key, value = layer.update(x[:, :, 4:8], x[:, :, 4:8])
    layer.crop(-2)
    layer.batch_select_indices(torch.tensor([2, 0]))
    again = layer.update(x[:2, :, 8:], x[:2, :, 8:])
    assert torch.equal(again[0][:, :, :6], key[[2, 0], :, :6])
    assert torch.equal(again[1][:, :, :6], value[[2, 0], :, :6])


def test_channels_and_tokens_without_spread():
    """A dead channel keeps its value, a constant token all of its own; nothing is NaN."""
    calibrated = sample()
    calibrated.layers[0].key[:, 0, 3] = 0.5
    layer = find(spoken(2, 0.0), calibrated).layer(PLACE)
    x = torch.full((1, 2, 2, 16), 0.5)
    key, value = layer.update(x, x)
    assert torch.isfinite(key).all()
    assert bool((key[0, 0, :, 3] == 0.5).all())
    assert torch.equal(value, x)


def test_a_calibration_is_needed_and_must_fit():
    with pytest.raises(InputError, match="is fitted to a calibration and got none; run `kvcalib fisher"):
        find("kvquant-published")
    with pytest.raises(InputError, match=r"calibration the test has for layer 0 \(2, 16\), this model has \(4, 16\)"):
        find("kvquant-published", sample()).layer(Place(0, 4, 16))
    with pytest.raises(InputError, match="for layer 3 nothing"):
        find("kvquant-published", sample()).layer(Place(3, 2, 16))
