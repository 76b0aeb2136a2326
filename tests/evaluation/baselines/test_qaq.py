import math

import numpy as np
import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.qaq import QaqLayer, QaqSettings, last_weights
from kvcalib.evaluation.baselines.variable import Grouped, VariableTrack
from tests.tiny import tiny_llama, tokens

HALF = np.float16


def split(group, share):
    """Inliers and outliers of the code: x <= kthvalue(ceil(r/2 n)) or x > kthvalue(floor((1 - r/2) n)), k from 1."""
    n, ordered = len(group), sorted(group)
    if not share:
        return list(range(n)), []
    low, high = ordered[math.ceil(share / 2 * n) - 1], ordered[math.floor((1 - share / 2) * n) - 1]
    out = [i for i, x in enumerate(group) if x <= low or x > high]
    return [i for i in range(n) if i not in out], out


def key_bits(span, total, eps, lowest, highest, q_norm=300.0):
    error = math.sqrt(12 / q_norm * math.log(total**3 / (total - 1) * eps**2 + 1))
    return min(max(math.ceil(math.log2(span / (2 * error) + 1)), lowest), highest)


def value_bits(span, total, eps, attention, lowest, highest):
    error = math.sqrt(12 / total) * eps / attention
    return min(max(math.ceil(math.log2(span / (2 * error) + 1)), lowest), highest)


def quantized(group, bits, share):
    """Codes and decoded numbers of one group, by the code's quantizer."""
    inside, out = split(group, share)
    kept = np.array([group[i] for i in inside], np.float32)
    mean, span = np.float32(HALF(kept.mean())), np.float32(HALF(kept.max() - kept.min()))
    step = span / np.float32(2**bits)
    codes = [
        float(np.clip(np.round((np.float32(x) - mean) / step), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1))
        if bits
        else -0.5
        for x in group
    ]
    back = [float(np.float32(q) * step + mean) for q in codes]
    for i in out:
        back[i] = group[i]
    return codes, back, float(span)


def numbers(*shape, seed=0):
    """Normal numbers of two bytes, no two of them equal."""
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2
    taken = set()
    for i, x in enumerate(found.flatten().tolist()):
        while float(HALF(x)) in taken:
            x *= 1.002
        taken.add(float(HALF(x)))
        found.view(-1)[i] = float(HALF(x))
    return found


@pytest.mark.parametrize("level", ["head", "layer"])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_widths_and_codes_are_those_of_the_published_code(level, share, eps):
    """The code's formulas number by number, for 6 tokens that came in a pass of a row of 20."""
    chosen = QaqSettings(error=eps, lowest=0, highest=7, window=3, outliers=share, level=level)
    layer = QaqLayer(Place(0, 2, 8), chosen)
    key, value = numbers(1, 2, 6, 8, seed=1), numbers(1, 2, 6, 8, seed=2)
    drawn = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(3)) ** 4 + 1e-3
    layer.store(key, value, drawn, torch.tensor([20]))
    for role, x in (("key", key), ("value", value)):
        groups = x[0].transpose(0, 1).reshape(6, *((2, 8) if level == "head" else (1, 16)))
        bits = layer.tracks[role].rows.read(0, 6)["bits"][0]
        back = layer.tracks[role].read()[0]
        for t in range(6):
            for g, group in enumerate(groups[t].tolist()):
                span = quantized(group, 1, share)[2]
                attention = float(drawn[0, 2 * g : 2 * g + 2, t].max() if level == "head" else drawn[0, :, t].max())
                expected = (
                    key_bits(span, 20, eps, 0, 7) if role == "key" else value_bits(span, 20, eps, attention, 0, 7)
                )
                if t >= 4:
                    expected = 7  # the last n - 1
                assert int(bits[t, g]) == expected
                codes, values, _ = quantized(group, expected, share)
                assert back[t, g].tolist() == pytest.approx(values, abs=1e-5)
        packed = Grouped(x.transpose(1, 2).reshape(1, 6, len(groups[0]), -1), share, torch.float16).codes(bits[None])
        for t, g in np.ndindex(6, len(groups[0])):
            width = int(bits[t, g])
            if width:
                codes = quantized(groups[t, g].tolist(), width, share)[0]
                assert (packed[0, t, g] - 2 ** (width - 1)).tolist() == codes
    assert len({int(b) for role in ("key", "value") for b in layer.tracks[role].rows.read(0, 4)["bits"].flatten()}) > 1


def test_no_bits_decode_to_the_mean_less_half_the_range():
    group = [0.0, 1.0, 2.0, 6.0]
    track = VariableTrack(1, 4, 0.0)
    track.append(Grouped(torch.tensor([[[group]]]), 0.0, torch.float16), torch.zeros(1, 1, 1, dtype=torch.long))
    assert track.read().flatten().tolist() == [2.25 - 3.0] * 4


def test_a_skewed_group_is_clipped_as_published():
    """Fifteen zeros and a one at 4 bits: the one comes back as about a half."""
    track = VariableTrack(1, 16, 0.0)
    track.append(
        Grouped(torch.tensor([0.0] * 15 + [1.0]).view(1, 1, 1, 16), 0.0, torch.float16), torch.full((1, 1, 1), 4)
    )
    assert float(track.read().flatten()[-1]) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("padded", [0, 5])
def test_attention_that_decides_is_the_models(padded):
    """The weights of the last n queries, against transformers' own of the same keys."""
    model = tiny_llama(attn_implementation="eager")
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen = {}

    def noting(layer, key, value, drawn, count):
        if id(layer) not in seen:
            seen[id(layer)] = (drawn, count)
        store(layer, key, value, drawn, count)

    store = QaqLayer.store
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    chosen = find("qaq-published:window=4:lowest=8:highest=8:outliers=0")
    with pytest.MonkeyPatch.context() as patch, chosen.run(model) as session, torch.no_grad():
        patch.setattr(QaqLayer, "store", noting)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=session.new_cache())
    first = next(iter(seen.values()))
    assert torch.allclose(first[0], weights[0][:, :, -4:].amax(2), atol=1e-5)
    assert first[1].tolist() == [14 - padded, 14]


def test_last_weights_mask_the_future():
    class Call:
        mask, scaling, kwargs = None, 1.0, {}

    found = last_weights(numbers(1, 4, 3, 8), numbers(1, 2, 7, 8, seed=4), Call)
    assert torch.allclose(found.sum(-1), torch.ones(1, 4, 3))
    assert bool((found[:, :, 0, 5:] == 0).all())
    assert bool((found[:, :, 1, 6:] == 0).all())
    assert bool((found[:, :, 2] > 0).all())


def test_bytes_by_hand():
    """A head of 8 with 10 %: 1 + 1 outliers of 3 bytes, tag, range and mean; a word for up to 4 bits of 8 codes."""
    layer = QaqLayer(Place(0, 2, 8), QaqSettings(lowest=3, highest=3, outliers=0.1, window=1))
    x = numbers(2, 2, 5, 8)
    layer.store(x, x, torch.rand(2, 4, 5), torch.tensor([5, 5]))
    assert layer.nbytes == 2 * 2 * 2 * 5 * (2 * 3 + 1 + 4 + 4)


def test_crop_and_select_move_codes_along():
    layer = QaqLayer(Place(0, 2, 8), QaqSettings(error=0.1, lowest=1, highest=6, window=1))
    x, drawn = numbers(3, 2, 9, 8), torch.rand(3, 4, 9)
    for part in (slice(0, 5), slice(5, 9)):
        layer.store(x[:, :, part], x[:, :, part], drawn[..., part], torch.tensor([9, 9, 9]))
    before = layer.read("value", torch.float32)
    assert len(set(layer.tracks["value"].rows.read(0, 9)["bits"].flatten().tolist())) > 2
    layer.seen, layer.real = 9, torch.tensor([9, 7, 9], dtype=torch.int32)
    layer.crop(-3)
    layer.batch_select_indices(torch.tensor([2, 1, 2]))
    assert torch.equal(layer.read("value", torch.float32), before[[2, 1, 2], :, :6])
    assert layer.real.tolist() == [6, 4, 6]
    layer.store(x[:, :, :1], x[:, :, :1], drawn[..., :1], torch.tensor([7, 5, 7]))
    assert torch.equal(layer.read("value", torch.float32)[:, :, :6], before[[2, 1, 2], :, :6])


def test_settings_that_contradict_one_another():
    with pytest.raises(InputError, match="lowest is 5, expected at most highest, which is 4"):
        find("qaq-published:lowest=5")
    with pytest.raises(InputError, match="level is 'token'"):
        find("qaq-published:level=token")
