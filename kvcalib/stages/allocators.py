"""The three methods of `allocate` behind one interface: code bits per token in, widths and their predicted loss out.

- fisher: the predicted loss that `fit-nuq` recorded, spent by the exact solver.
- kl: the same solver, on losses scaled to what was measured with the model (`allocation/kl.py`).
- qaq: QAQ's bounds (`allocation/qaq.py`) on the calibration's statistics; its plans are judged by fisher's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcalib.allocation import fisher, qaq, spare
from kvcalib.allocation.fisher import Per, Table
from kvcalib.allocation.kl import measured_loss
from kvcalib.allocation.sensitivity import HeadStatistics, head_statistics, relative
from kvcalib.calibration.statistics import Calibration, norm_quantile, rope_pairs
from kvcalib.errors import InputError
from kvcalib.quant.outliers import outlier_count
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Role, sample_without_sinks

Name = tuple[int, Role]
EXACT = 16
"""The width of every channel of a layer that stays exact."""
QUERY_SHARE = 0.9
"""QAQ takes |q|^2 so that its bounds hold for this share of the queries."""
QAQ_TOKENS = 2048
"""Sampled tokens over which QAQ averages; the paper's code needs a search over all of them for every budget."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a method makes of a number of bits.

    Attributes:
        widths: by layer and role, a width per channel `[H, D]` uint8.
        loss: predicted loss, nats per token. bound: no plan of these bits and units has a smaller one, where known.
        fill: the widths that a number of words in all rows together allows, and their loss, where the method can tell.
    """

    widths: dict[Name, Tensor]
    loss: float
    bound: float | None = None
    fill: Callable[[int], Proposal] | None = None


Allocator = Callable[[int], Proposal]
"""From the sum of all code widths that a token may have to a proposal; InputError if no plan has so few."""
Tables = dict[Name, Table]


def is_exact(widths: Tensor) -> bool:
    """Whether a layer's keys or values of these widths stay exact."""
    return bool((widths == EXACT).all())


def loss_tables(codebooks: Codebooks, calibration: Calibration, layers: list[int]) -> Tables:
    """The predicted losses of `layers`, as `fit-nuq` recorded them."""
    pairs = {shape.index: torch.tensor(rope_pairs(shape.partner)) for shape in calibration.info.layers}
    return {
        (layer, role): Table(codebooks.get(layer, role, "loss"), pairs[layer] if role == "key" else None)
        for layer in layers
        for role in ROLES
    }


def measured_tables(tables: Tables, measured: Mapping[Name, Mapping[int, float]]) -> Tables:
    """`tables` scaled to measured KL by layer, role and width."""
    return {name: Table(measured_loss(table.loss, measured[name]), table.pairs) for name, table in tables.items()}


def weighted(tables: Tables, weight: Callable[[Name], float]) -> Tables:
    """`tables` with the losses of each layer's keys or values times `weight`."""
    return {name: Table(table.loss.double() * weight(name), table.pairs) for name, table in tables.items()}


def predicted(tables: Tables, widths: Mapping[Name, Tensor]) -> dict[Name, float]:
    """Predicted loss of `widths` by layer and role, nats per token."""
    return {n: float(t.loss.double().gather(0, widths[n].long()[None]).sum()) for n, t in tables.items()}


def by_loss(tables: Tables, per: Per, group: int) -> Allocator:
    """Least loss, by the exact solver."""

    def propose(bits: int) -> Proposal:
        widths, plan = fisher.allocate(list(tables.values()), bits, per, group)
        plain = dict(zip(tables, widths, strict=True))
        return Proposal(plain, plan.loss, plan.bound, lambda words: filled(plain, words))

    def filled(plain: dict[Name, Tensor], words: int) -> Proposal:
        wider = spare.fill(list(tables.values()), list(plain.values()), words, per, group)
        widths = dict(zip(tables, wider, strict=True))
        return Proposal(widths, sum(predicted(tables, widths).values()))

    return propose


def by_qaq(
    codebooks: Codebooks, calibration: Calibration, judge: Tables, per: qaq.Per, as_published: bool = False
) -> Allocator:
    """QAQ's bounds, or with `as_published` the arithmetic of the paper's code.

    Raises:
        InputError: the calibration does not say how attention scales its scores.
    """
    layers = sorted({layer for layer, _ in judge})
    heads = [_heads(codebooks, calibration, layer, as_published) for layer in layers]
    bound: qaq.Bound = "published" if as_published else "shared"
    # The paper's experiments end at 4 bits; a budget beyond needs more.
    limits = qaq.Published(highest=8) if as_published else None

    def propose(bits: int) -> Proposal:
        found = qaq.allocate(heads, bits, bound, limits, per)
        widths: dict[Name, Tensor] = {}
        for layer, key, value in zip(layers, found.key, found.value, strict=True):
            for role, chosen in zip(ROLES, (key, value), strict=True):
                widths[layer, role] = codebooks.widths(layer, role, chosen[:, None]).contiguous()
        return Proposal(widths, sum(predicted(judge, widths).values()))

    return propose


def _heads(codebooks: Codebooks, calibration: Calibration, layer: int, as_published: bool) -> HeadStatistics:
    shape = next(s for s in calibration.info.layers if s.index == layer)
    if shape.scaling is None:
        raise InputError(
            f"allocate: qaq needs the attention scaling of layer {layer}, which the run's calibration (version "
            f"{calibration.info.version}) does not record; run `kvcalib fisher` again with --overwrite, then fit-nuq"
        )
    data = calibration.layer(layer)
    # The sample is in the order of its hashes, so its first tokens are a uniform sample too.
    keep = sample_without_sinks(calibration, codebooks.settings.sinks).nonzero()[:QAQ_TOKENS, 0]
    norm = norm_quantile(data["query.norm_histogram"], QUERY_SHARE).reshape(shape.kv_heads, -1).max(1)
    found = head_statistics(
        data["sample.key"][keep],
        data["sample.value"][keep],
        data["sample.attention_sum"][keep],
        data["sample.attention_peak"][keep],
        torch.from_numpy(norm),
        calibration.info.seq_len if shape.sliding is None else min(shape.sliding, calibration.info.seq_len),
        shape.scaling,
        outlier_count(codebooks.settings.outliers, shape.head_dim),
        None if as_published else data["key.sum"] / calibration.info.tokens,
    )
    # One target for all layers means nothing unless it is relative; the paper's code takes it as it is.
    return found if as_published else relative(found)
