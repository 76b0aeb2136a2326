import torch

from kvcalib.evaluation.baselines.stored import Codec, StoredLayer


class Rounding(Codec):
    """Blocks of three tokens, whole numbers in a byte; the last two tokens wait."""

    block = 3

    def encode(self, x, exact):
        return {"code": x.round().to(torch.int8).unflatten(1, (-1, 3))}

    def decode(self, rows):
        return rows["code"].float().flatten(1, 2)

    def leaving(self, window):
        return max(0, window - 2) // 3 * 3


def simulated(x, exact):
    return torch.cat([x[:, :, :exact].round(), x[:, :, exact:]], 2)


def test_any_passes_store_the_same():
    x = (torch.randn(2, 2, 17, 4) * 5).half().float()
    for cuts in ([17], [1] * 17, [4, 2, 11], [2, 15]):
        layer = StoredLayer(Rounding(), Rounding())
        for part in x.split(cuts, 2):
            key, value = layer.update(part, -part)
        assert torch.equal(key, simulated(x, 15))
        assert torch.equal(value, simulated(-x, 15))
        assert layer.get_seq_length() == 17


def test_crop_reorder_and_reset():
    x = (torch.randn(2, 1, 14, 4) * 5).half().float()
    layer = StoredLayer(Rounding(), Rounding())
    layer.update(x, x)  # twelve tokens stored, two wait
    layer.crop(-1)
    assert torch.equal(layer.update(x[:, :, 13:], x[:, :, 13:])[0], simulated(x, 12))
    layer.crop(-7)  # into the third block: its first token is exact from now on, as it was stored
    layer.reorder_cache(torch.tensor([1, 0]))
    key, _ = layer.update(x[:, :, 13:], x[:, :, 13:])
    assert torch.equal(key[:, :, :7], x.flip(0)[:, :, :7].round())
    assert torch.equal(key[:, :, 7:], x[:, :, 13:])
    layer.batch_repeat_interleave(2)
    assert layer.batch == 4
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.nbytes == 0
    assert torch.equal(layer.update(x[:1, :, :2], x[:1, :, :2])[0], x[:1, :, :2])


def test_bytes_are_those_held():
    layer = StoredLayer(Rounding(), Rounding())
    layer.update(torch.zeros(2, 3, 8, 4), torch.zeros(2, 3, 8, 4))
    assert layer.nbytes == 2 * 2 * (6 * 12 * 1 + 2 * 12 * 2)


def test_numbers_come_in_the_two_byte_type_of_the_model():
    x = torch.full((1, 1, 1, 4), 1 / 3)
    for dtype, kept in ((torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16,) * 2):
        layer = StoredLayer(Rounding(), Rounding())
        key, _ = layer.update(x.to(dtype), x.to(dtype))
        assert key.dtype == dtype
        assert torch.equal(key, x.to(kept).to(dtype))
