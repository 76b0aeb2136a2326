"""Widths by predicted loss: units, groups and the budget."""

import itertools

import pytest
import torch

from kvcalib.allocation.fisher import Table, allocate
from kvcalib.quant.packing import GROUP, Layout


def table(heads=2, dim=32, seed=0, paired=True):
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(heads, dim, generator=generator).mul(6).exp()
    loss = size * 4.0 ** -torch.arange(9).view(9, 1, 1)
    half = torch.arange(dim // 2)
    return Table(loss, torch.stack([half, half + dim // 2], 1) if paired else None)


def total(tables, widths):
    return sum(float(t.loss.double().gather(0, w.long()[None]).sum()) for t, w in zip(tables, widths, strict=True))


@pytest.mark.parametrize("per", ["channel", "head", "layer"])
@pytest.mark.parametrize("group", [0, GROUP])
@pytest.mark.parametrize("mean", [0.0, 1.3, 2.5, 8.0])
def test_the_budget_is_kept_and_losses_add_up(per, group, mean):
    tables = [table(seed=0), table(seed=1, paired=False)]
    bits = int(mean * 128)
    widths, plan = allocate(tables, bits, per, group)
    assert sum(int(w.sum()) for w in widths) == plan.cost <= bits
    assert plan.loss == pytest.approx(total(tables, widths))
    assert plan.bound <= plan.loss * (1 + 1e-12)
    for t, w in zip(tables, widths, strict=True):
        assert w.shape == t.loss.shape[1:]
        if per == "layer":
            assert len(w.unique()) == 1
        if per == "head" or per == "layer":
            assert bool((w == w[:, :1]).all())
        elif group:
            for counts in (torch.bincount(row.long(), minlength=9) for row in w):
                assert bool((counts % GROUP == 0).all())
            if t.pairs is not None:
                assert bool((w[:, t.pairs[:, 0]] == w[:, t.pairs[:, 1]]).all())
            order = None if t.pairs is None else t.pairs.flatten().expand(2, -1)
            assert Layout.build(w, order=order).groups(t.pairs) is not None


def test_finer_units_lose_less():
    tables = [table(seed=2), table(seed=3, paired=False)]
    losses = [
        allocate(tables, 256, per, group)[1].loss
        for per, group in (("layer", 0), ("head", 0), ("channel", GROUP), ("channel", 0))
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.9 * losses[0]


def test_layers_get_what_brute_force_gives_them():
    tables = [table(heads=1, dim=4, seed=s, paired=False) for s in range(3)]
    widths, plan = allocate(tables, 26, "layer")
    best = min(
        sum(float(t.loss[w].double().sum()) for t, w in zip(tables, chosen, strict=True))
        for chosen in itertools.product(range(9), repeat=3)
        if 4 * sum(chosen) <= 26
    )
    assert plan.loss == pytest.approx(best)
    assert total(tables, widths) == pytest.approx(best)
