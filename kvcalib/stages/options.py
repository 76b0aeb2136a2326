"""What `allocate` asks of codebooks with several options: outlier counts, scopes and widths out of one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcalib.allocation.fisher import Per, Table
from kvcalib.allocation.options import Option as Priced
from kvcalib.allocation.options import Rows
from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.errors import InputError
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.outliers import outlier_count
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.stages.fit_nuq import ROLES, Codebooks, Options, Role

Name = tuple[int, Role]
POSITION_BITS, EXACT_BITS = 32, 16


@dataclass(frozen=True)
class Found:
    """What a budget was spent on.

    Attributes:
        codebooks: those given, under the chosen options.
        widths: by layer and role, `[H, D]` uint8. options: by layer and role.
        loss: predicted loss of the plan; no plan of the budget, of any options, has less than `bound`.
        effective_bits: of a long cache without sinks, recent window and spare room.
    """

    codebooks: Codebooks
    widths: dict[Name, Tensor]
    options: Options
    loss: float
    bound: float
    effective_bits: float


def within(
    codebooks: Codebooks,
    calibration: Calibration,
    layers: list[int],
    budget: float,
    per: Per,
    group: int,
    tables: Mapping[Name, Table] | None = None,
) -> Found:
    """Options and widths of `layers` of least predicted loss, with at most `budget` effective bits.

    The codebooks' other layers stay exact, at 16 bits.

    Args:
        codebooks: what their `options` are chosen among.
        budget: bits of a token's rows in all layers, and of its position, per key or value element.
        per, group: what takes one width; see `allocation.fisher.allocate`.
        tables: other losses than `fit-nuq` recorded; the options then stay those that the codebooks stand under.

    Raises:
        InputError: the budget is below the smallest plan or above the largest one; says which they are.
    """
    names = [(layer, role) for layer in layers for role in ROLES]
    others = [layer for layer in codebooks.layers if layer not in layers]
    exact = sum(codebooks.get(layer, role, "weight").numel() for layer in others for role in ROLES)
    elements = exact + sum(codebooks.get(*name, "weight").numel() for name in names)
    fixed = POSITION_BITS + EXACT_BITS * exact
    room = int(budget * elements + 1e-6) - fixed
    rows = problem(codebooks, calibration, names, room, per, group, tables)
    smallest, largest = ((bits + fixed) / elements for bits in (rows.smallest, rows.largest))
    if not smallest <= budget <= largest:
        given = _named(codebooks, names) + (f" and layers {others} exact" if others else "")
        raise InputError(
            f"allocate: the budget is {budget:g} effective bits; with {given} the smallest plan has {smallest:.3f} and "
            f"the largest {largest:.3f}; choose one between, or fit codebooks with fewer outliers"
        )
    bound = None
    while True:
        chosen = rows.solve(room)
        bound = chosen.plan.bound if bound is None else bound
        options = {
            name: codebooks.options(*name)[k] if tables is None else codebooks.option(*name)
            for name, k in zip(names, chosen.option, strict=True)
        }
        under, widths = codebooks.under(options), dict(zip(names, chosen.widths, strict=True))
        total = fixed + sum(row_bits(under.quantizer(layer, role, w, False)) for (layer, role), w in widths.items())
        excess = total - int(budget * elements + 1e-6)
        if excess <= 0 or room == rows.smallest:
            return Found(under, widths, options, chosen.plan.loss, bound, total / elements)
        # Where every head's words stand alone, a row can take a word more than its codes do.
        room = max(rows.smallest, room - excess)


def _named(codebooks: Codebooks, names: list[Name]) -> str:
    """The outlier shares that may be chosen, for people."""
    shares = sorted({option.outliers for name in names for option in codebooks.options(*name)})
    return " or ".join(f"{100 * share:g} %" for share in shares) + " outliers"


def problem(
    codebooks: Codebooks,
    calibration: Calibration,
    names: list[Name],
    bits: int,
    per: Per,
    group: int,
    tables: Mapping[Name, Table] | None = None,
) -> Rows:
    """The rows of these layers and roles, with what each of their options costs and loses; `tables` as in `within`."""
    pairs = {shape.index: torch.tensor(rope_pairs(shape.partner)) for shape in calibration.info.layers}
    rows: list[list[Priced]] = []
    for layer, role in names:
        if tables is not None:
            rows.append([Priced(tables[layer, role], overhead(codebooks, layer, role))])
            continue
        rows.append([])
        for option in codebooks.options(layer, role):
            mine = codebooks.under({(layer, role): option})
            table = Table(mine.get(layer, role, "loss"), pairs[layer] if role == "key" else None)
            rows[-1].append(Priced(table, overhead(mine, layer, role)))
    elements = sum(codebooks.get(*name, "weight").numel() for name in names)
    room = bits - sum(min(option.overhead for option in row) for row in rows)
    return Rows(rows, max(0, room) / max(1, elements), per, group)


def overhead(codebooks: Codebooks, layer: int, role: Role) -> int:
    """Bits of one token of one layer's keys or values that no width changes."""
    weight, option = codebooks.get(layer, role, "weight"), codebooks.option(layer, role)
    codebook, layout = _empty(*weight.shape)
    elements = weight.shape[1] if option.scope == "head" else weight.numel()
    count = outlier_count(option.outliers, elements)
    return row_bits(Quantizer(codebook, layout, codebooks.settings.relative(role), option.scope, count, weight))


def row_bits(quantizer: Quantizer) -> int:
    """Bits of everything that is stored of one token of one layer's keys or values."""
    spec = quantizer.row_spec(torch.float16)
    return sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values())


@lru_cache
def _empty(heads: int, head_dim: int) -> tuple[Codebook, Layout]:
    """A codebook and a layout without a single bit."""
    widths = torch.zeros(heads, head_dim, dtype=torch.uint8)
    return Codebook(widths, torch.zeros(heads, head_dim, 1)), Layout.build(widths)
