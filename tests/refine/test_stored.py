"""What is stored, as a function of the centroids: against the quantizer itself, and its derivatives against loops."""

from dataclasses import replace

import pytest
import torch

from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.refine.stored import Centroids

HEADS, DIM, TOKENS = 2, 8, 40
CPU = torch.device("cpu")
KINDS = [
    (relative, scope, outliers) for relative in (False, True) for scope in ("token", "head") for outliers in (0, 2)
]


def quantizer(relative=False, scope="token", outliers=0, seed=0):
    """Widths 0 to 3, random centroids."""
    generator = torch.Generator().manual_seed(seed)
    widths = (torch.arange(HEADS * DIM) % 4).reshape(HEADS, DIM).to(torch.uint8)
    channels = [torch.randn(1 << int(w), generator=generator).sort().values for w in widths.flatten()]
    weight = torch.rand(HEADS, DIM, generator=generator)
    codebook = Codebook.from_ragged(torch.cat(channels), widths)
    return Quantizer(codebook, Layout.build(widths), relative, scope, outliers, weight)


def tensor(seed=1):
    return torch.randn(TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_quantizer(kind):
    made, x = quantizer(*kind), tensor()
    expected = made.decode(made.encode(x, torch.float16))
    assert torch.equal(Centroids(made, CPU).stored(x, torch.float16), expected)


def test_values_along_their_axes_go_there_and_back():
    """Values are those of the round trip; a gradient is that of what lies along the axes, turned likewise."""
    made, x, weights = quantizer(outliers=2), tensor(), tensor(2)
    made.basis = Basis.principal(tensor(3))
    plain, turned = Centroids(replace(made, basis=None), CPU), Centroids(made, CPU)
    found = turned.stored(x.requires_grad_(), torch.float16)
    assert torch.equal(found.detach(), made.round_trip(x.detach(), torch.float16))
    (found * weights).sum().backward()
    (plain.stored(made.along(x.detach()), torch.float16) * made.along(weights)).sum().backward()
    assert torch.allclose(turned.values.grad, plain.values.grad, atol=1e-5)
    assert torch.equal(x.grad, weights)
    assert torch.allclose(turned.error(x.detach()), plain.error(made.along(x.detach())))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences_of_the_quantizer(kind):
    """Of a sum over what is decoded, with random weights, centroid by centroid, where no code changes."""
    made, x, weights = quantizer(*kind), tensor(), tensor(2)
    centroids = Centroids(made, CPU)
    (centroids.stored(x, torch.float16) * weights).sum().backward()
    ragged, step = made.codebook.ragged(), 1e-3
    rows = made.encode(x, torch.float16)

    def value(place, by):
        moved = ragged.clone()
        moved[place] += by
        other = replace(made, codebook=Codebook.from_ragged(moved, made.layout.widths))
        return (other.decode(rows).double() * weights).sum()

    found = centroids.values.grad
    expected = torch.tensor([(value(i, step) - value(i, -step)) / (2 * step) for i in range(len(ragged))])
    assert torch.allclose(found, expected.float(), atol=2e-3)
    assert (found != 0).sum() > len(found) / 2


def test_codes_are_those_that_encode_chooses():
    """A quantizer may round in another way than to the nearest: what it stores is what is decoded."""

    class Upward(Quantizer):
        def encode(self, x, exact_dtype):
            codes = self.layout.unpack(super().encode(x, exact_dtype)["words"])
            most = (1 << self.layout.widths.int()) - 1
            return {"words": self.layout.pack(torch.minimum(codes + 1, most))}

    plain = quantizer()
    made = Upward(plain.codebook, plain.layout, False, "token", 0, plain.weight)
    x, centroids = tensor(), Centroids(made, CPU)
    stored = centroids.stored(x, torch.float16)
    assert torch.equal(stored, made.decode(made.encode(x, torch.float16)))
    assert not torch.equal(stored, Centroids(plain, CPU).stored(x, torch.float16))
    stored.sum().backward()
    narrow = made.layout.widths.flatten()[centroids.channel] == 1
    assert centroids.values.grad[narrow].sum() == narrow.sum() / 2 * TOKENS
    assert not centroids.values.grad[narrow][::2].any(), "the lower of two is never taken"


def test_the_choice_counts_as_the_identity():
    x, weights = tensor().requires_grad_(), tensor(2)
    (Centroids(quantizer(True, "head", 1), CPU).stored(x, torch.float16) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_quantizer_follows_its_centroids():
    centroids, x = Centroids(quantizer(), CPU), tensor()
    before = centroids.quantizer
    assert centroids.quantizer is before
    with torch.no_grad():
        centroids.values += 1
    assert torch.equal(centroids.quantizer.codebook.ragged(), before.codebook.ragged() + 1)
    assert torch.equal(
        centroids.stored(x, torch.float16), centroids.quantizer.decode(centroids.quantizer.encode(x, torch.float16))
    )


def test_settle_orders_each_channel_and_what_lies_beside():
    centroids = Centroids(quantizer(), CPU)
    with torch.no_grad():
        centroids.values.copy_(torch.randn(len(centroids.values), generator=torch.Generator().manual_seed(3)))
        centroids.values[0], centroids.values[-1] = 1e6, -1e6
    beside = centroids.values.detach() * 2
    expected = [
        centroids.values.detach()[centroids.channel == c].clamp(-65504, 65504).sort().values for c in range(HEADS * DIM)
    ]
    pairs = {(float(v.clamp(-65504, 65504)), float(b)) for v, b in zip(centroids.values.detach(), beside, strict=True)}
    centroids.settle(beside)
    assert torch.equal(centroids.values.detach(), torch.cat(expected))
    assert {(float(v), float(b)) for v, b in zip(centroids.values.detach(), beside, strict=True)} == pairs


@pytest.mark.parametrize("outliers", [0, 2])
def test_error_is_what_storing_takes(outliers):
    made, x = quantizer(outliers=outliers), tensor()
    expected = (x - made.decode(made.encode(x, torch.float16))).square().mean(0).sqrt()
    assert torch.allclose(Centroids(made, CPU).error(x), expected.flatten())
    relative = quantizer(True, outliers=outliers)
    rows = relative.encode(x, torch.float16)
    scale = rows["scale"].float()[..., None]
    off = (x - relative.decode(rows)) / scale
    assert torch.allclose(Centroids(relative, CPU).error(x), off.square().mean(0).sqrt().flatten())
