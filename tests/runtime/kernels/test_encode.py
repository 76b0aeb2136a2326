"""The encode kernel writes what `Quantizer.encode` gives, bit for bit."""

from dataclasses import replace

import pytest
import torch

from tests.runtime.kernels.layers import Case, add_feedback, make_angles, make_quantizer, order_of

CASES = [
    *[Case(key_bits=w, value_bits=w) for w in range(9)],
    Case(key_bits="mixed", value_bits="mixed", dim=128, heads=3),
    Case(key_bits="free", value_bits="free", dim=80, heads=3, segment="row"),
    Case(key_bits="mixed", value_bits="free", scope="token", outliers=7, heads=3, dim=96),
    Case(outliers=0, heads=1),
    Case(outliers=0, scope="token", dtype=torch.bfloat16),
    Case(outliers=1, scope="token", dtype=torch.bfloat16),
    Case(outliers=31, dim=32, heads=2),
    Case(outliers=63, dim=32, heads=2, scope="token", dtype=torch.float16),
    Case(dim=256, heads=2, scope="token", outliers=6),
    Case(key_bits="free", value_bits="free", dim=48, heads=3, segment="row", feedback=True),
    Case(key_bits="mixed", value_bits="mixed", scope="token", outliers=7, heads=3, dim=32, feedback=True),
    Case(key_bits=1, value_bits=8, outliers=0, dim=16, heads=1, dtype=torch.bfloat16, feedback=True),
    Case(value_bits="free", scope="token", outliers=5, heads=3, dim=32, relative=False),
    Case(key_bits=1, value_bits=2, outliers=1, dim=16, heads=1, dtype=torch.bfloat16, feedback=True, relative=False),
    Case(value_bits=8, outliers=0, dim=16, relative=False),
]


def quantizers(case):
    order = order_of(make_angles(case.dim), case.heads)
    plain = torch.arange(case.dim).expand(case.heads, -1)
    key = make_quantizer(False, case.key_bits, case.heads, case.dim, case.outliers, case.scope, order, 1, case.segment)
    value = make_quantizer(
        case.relative, case.value_bits, case.heads, case.dim, case.outliers, case.scope, plain, 2, case.segment
    )
    if case.feedback:
        add_feedback(key, value)
    return key, value


def buffers(pair, exact, batch, tokens, device):
    """Rows with room before and after the new tokens, filled with junk."""
    room, rows = {}, {}
    for name, quantizer in zip(("key", "value"), pair, strict=True):
        for what, (shape, dtype) in quantizer.row_spec(exact).items():
            full = torch.full((batch, tokens + 5, *shape), 77, dtype=dtype, device=device)
            room[f"{name}.{what}"] = full
            rows[f"{name}.{what}"] = full[:, 2 : 2 + tokens]
    return room, rows


def encode(case, key, value, device):
    from kvcalib.runtime.kernels.encode import packed_encode

    pair = quantizers(case)
    exact = torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float16
    room, rows = buffers(pair, exact, *key.shape[:2], device)
    packed_encode(key.to(device), value.to(device), *pair, rows)
    for full in room.values():
        assert (full[:, :2] == 77).all()
        assert (full[:, 2 + key.shape[1] :] == 77).all()
    expected = {}
    for name, quantizer, x in (("key", pair[0], key), ("value", pair[1], value)):
        for what, tensor in quantizer.encode(x.flatten(0, 1), exact).items():
            expected[f"{name}.{what}"] = tensor.reshape(*key.shape[:2], *tensor.shape[1:])
    return {n: t.cpu() for n, t in rows.items()}, expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_the_quantizer(case, device):
    generator = torch.Generator().manual_seed(0)
    # As the cache gets them: [B, H, t, D] seen as [B, t, H, D].
    key, value = (
        torch.randn(2, case.heads, 3, case.dim, generator=generator).to(case.dtype).transpose(1, 2) for _ in range(2)
    )
    found, expected = encode(case, key, value, device)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_constant_and_huge_tokens(device):
    """No spread (scale 0), elements beyond the range of float16, and many equal values."""
    case = Case(key_bits=4, value_bits=4, outliers=2)
    key = torch.zeros(1, 4, 2, 64)
    value = torch.zeros(1, 4, 2, 64)
    value[0, 1] = 0.25
    value[0, 2, :, 7] = 1e6
    value[0, 2, :, 9] = -1e6
    value[0, 3] = torch.randint(-2, 3, (2, 64), generator=torch.Generator().manual_seed(0)).float()
    key[0, 2, :, 5] = 1e6
    key[0, 3] = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    found, expected = encode(case, key, value, device)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def residue_of(quantizer, rows, x):
    """Error and size of each token and head in float64, from what `Quantizer.decode` makes of the rows."""
    batch, tokens, heads, dim = x.shape
    decoded = quantizer.decode({n: t.flatten(0, 1) for n, t in rows.items()}).view(batch, tokens, heads, dim).double()
    x = x.double()
    return torch.stack([(x - decoded).square().sum(-1), x.square().sum(-1)], -1)


@pytest.mark.parametrize(
    "case",
    [
        Case(key_bits=2, value_bits=2),
        Case(key_bits="mixed", value_bits="free", scope="token", outliers=7, heads=3, dim=96),
        Case(key_bits="free", value_bits="free", dim=80, heads=3, segment="row", dtype=torch.bfloat16),
        Case(outliers=0, heads=3, dtype=torch.float16),
        Case(outliers=0, heads=3, scope="token"),
        Case(outliers=0, heads=1),
        Case(key_bits="free", value_bits="free", dim=16, heads=3, feedback=True),
        Case(outliers=0, dim=16, heads=2, scope="token", dtype=torch.bfloat16, feedback=True),
        Case(value_bits="mixed", dim=32, relative=False),
    ],
    ids=str,
)
def test_residue_is_the_error_of_what_is_stored(case, device):
    from kvcalib.runtime.kernels.encode import packed_encode

    generator = torch.Generator().manual_seed(3)
    key, value = (
        torch.randn(2, case.heads, 3, case.dim, generator=generator).to(case.dtype).transpose(1, 2) for _ in range(2)
    )
    value[1, 2] = 0.5
    value[1, 1, -1, 9] = 300.0
    pair = quantizers(case)
    exact = torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float16
    _, plain = buffers(pair, exact, 2, 3, device)
    packed_encode(key.to(device), value.to(device), *pair, plain)
    _, rows = buffers(pair, exact, 2, 3, device)
    # One dense, one a view: heads outside tokens, as a cache may keep it.
    found = torch.full((2, 3, case.heads, 2), torch.nan, device=device)
    other = torch.full((2, case.heads, 3, 2), torch.nan, device=device).transpose(1, 2)
    packed_encode(key.to(device), value.to(device), *pair, rows, (found, other))
    for name, quantizer, x, residue in (("key", pair[0], key, found), ("value", pair[1], value, other)):
        assert all(torch.equal(rows[n], plain[n]) for n in rows)
        mine = {n.split(".")[1]: t.cpu() for n, t in rows.items() if n.startswith(name)}
        expected = residue_of(quantizer, mine, x)
        assert (expected[..., 0] > 1e-3).any()
        torch.testing.assert_close(residue.cpu().double(), expected, rtol=2e-5, atol=1e-6)


def test_scales_of_a_token_are_copied_for_every_head(device):
    """Rows of a cache whose heads may part: the token's zero and scale, once for each of them."""
    from kvcalib.runtime.kernels.encode import packed_encode

    case = Case(outliers=0, heads=3, scope="token")
    key, value = (torch.randn(1, 4, 3, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    pair = quantizers(case)
    _, plain = buffers(pair, torch.float16, 1, 4, device)
    apart = pair[0], replace(pair[1], scope="head")
    room, rows = buffers(apart, torch.float16, 1, 4, device)
    residue = torch.empty(2, 1, 4, 3, 2, device=device)
    packed_encode(key.to(device), value.to(device), *pair, plain)
    packed_encode(key.to(device), value.to(device), *pair, rows, (residue[0], residue[1]))
    for name, tensor in plain.items():
        assert torch.equal(rows[name], tensor.expand_as(rows[name])), name
    assert rows["value.scale"].shape == (1, 4, 3)
    for full in room.values():
        assert (full[:, :2] == 77).all()
        assert (full[:, 6:] == 77).all()
    mine = {n.split(".")[1]: t.cpu() for n, t in rows.items() if n.startswith("value")}
    torch.testing.assert_close(residue[1].cpu().double(), residue_of(apart[1], mine, value), rtol=2e-5, atol=1e-6)


def test_what_cannot_be_filled_is_refused(device):
    from kvcalib.runtime.kernels.encode import packed_encode

    x = torch.zeros(1, 2, 2, 64, device=device)
    pair = quantizers(Case())
    _, rows = buffers(pair, torch.float16, 1, 2, device)
    good, bad = torch.zeros(1, 2, 2, 2, device=device), torch.zeros(1, 2, 2, device=device)
    with pytest.raises(
        ValueError, match=r"residue of values is torch.float32 \[1, 2, 2\], expected float32 \[1, 2, 2, 2\]"
    ):
        packed_encode(x, x, *pair, rows, (good, bad))
    token = quantizers(Case(scope="token"))
    with pytest.raises(ValueError, match=r"rows\['value.zero'\] has 2 groups a token, expected 1 for .* 2 outliers"):
        packed_encode(x, x, *token, rows)
