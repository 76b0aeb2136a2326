import numpy as np
import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.kivi import KeyCodec, ValueCodec


def quantized(group: np.ndarray, bits: int) -> tuple[list[int], list[float]]:
    """KIVI's Q of one group: z = min, s = (max - min) / (2^B - 1), round((x - z) / s)."""
    z = np.float32(np.float16(group.min()))
    s = np.float32(np.float16(np.float32(group.max() - group.min()) / np.float32(2**bits - 1)))
    codes = [int(np.clip(np.round((x - z) / s), 0, 2**bits - 1)) for x in group]
    return codes, [float(z + s * np.float32(code)) for code in codes]


@pytest.mark.parametrize("bits", [2, 4])
def test_key_codes_are_per_channel_in_groups_of_tokens(bits):
    batch, tokens, heads, channels, group = 2, 12, 2, 8, 4
    x = torch.randn(batch, tokens, heads, channels, generator=torch.Generator().manual_seed(0)) * 2
    codec = KeyCodec(Place(0, heads, channels), bits, group, 8)
    rows = codec.encode(x, torch.float16)
    codes = codec.layout.unpack(rows["words"]).flatten(1, 2).numpy()
    back = codec.decode(rows).numpy()
    for b in range(batch):
        for h in range(heads):
            for d in range(channels):
                for g in range(0, tokens, group):
                    expected, values = quantized(x[b, g : g + group, h, d].numpy(), bits)
                    assert codes[b, g : g + group, h, d].tolist() == expected
                    assert np.allclose(back[b, g : g + group, h, d], values, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_value_codes_are_per_token_in_groups_of_channels(bits):
    x = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    codec = ValueCodec(Place(0, 2, 8), bits, 4, 0)
    rows = codec.encode(x, torch.float16)
    codes = codec.layout.unpack(rows["words"]).numpy()
    for b, t, h in np.ndindex(2, 5, 2):
        for g in (0, 4):
            assert codes[b, t, h, g : g + 4].tolist() == quantized(x[b, t, h, g : g + 4].numpy(), bits)[0]


@pytest.mark.parametrize("cuts", [[21], [1] * 21, [5, 9, 7], [8, 8, 5]])
def test_residuals_of_algorithm_1(cuts):
    """Of T = 21 tokens with R = 8: of keys the last 21 mod 8 are exact, of values the last 8; however they came."""
    x = torch.randn(1, 2, 21, 8, generator=torch.Generator().manual_seed(2)).half().float()
    layer = find("kivi:bits=2:group=4:residual=8").layer(Place(0, 2, 8))
    for part in x.split(cuts, 2):
        key, value = layer.update(part, part)
    assert torch.equal(key[:, :, 16:], x[:, :, 16:])
    assert not bool((key[:, :, :16] == x[:, :, :16]).all(-1).any())
    assert torch.equal(value[:, :, 13:], x[:, :, 13:])
    assert not bool((value[:, :, :13] == x[:, :, :13]).all(-1).any())
    whole = find("kivi:bits=2:group=4:residual=8").layer(Place(0, 2, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.update(x, x), (key, value), strict=True))


def test_bytes_by_hand():
    """T = 21, R = 8, 2 heads of 8, 2 bits: keys 16 tokens of one word and 4 groups' min and step; 5 exact ones."""
    x = torch.randn(1, 2, 21, 8)
    layer = find("kivi:bits=2:group=4:residual=8").layer(Place(0, 2, 8))
    layer.update(x, x)
    keys = 16 * 4 + 4 * 16 * 2 * 2 + 5 * 16 * 2
    values = 13 * 4 + 13 * 2 * 2 * 2 * 2 + 8 * 16 * 2
    assert layer.nbytes == keys + values


def test_crop_into_a_group_puts_its_rest_back_as_stored():
    x = torch.randn(2, 2, 24, 8).half().float()
    layer = find("kivi:bits=2:group=4:residual=8").layer(Place(0, 2, 8))
    key, value = layer.update(x, x)
    layer.crop(-10)
    again = layer.update(x[:, :, 14:15], x[:, :, 14:15])
    assert layer.get_seq_length() == 15
    assert torch.allclose(again[0][:, :, :14], key[:, :, :14], atol=2e-3)
    assert torch.allclose(again[1][:, :, :14], value[:, :, :14], atol=2e-3)
    assert torch.equal(again[0][:, :, 14:], x[:, :, 14:15])


def test_a_residual_that_is_no_multiple_of_the_group_is_refused():
    with pytest.raises(InputError, match=r"residual is 40, expected a multiple of group, which is 32"):
        find("kivi:residual=40")
