"""The one dial: a budget of effective bits, and which budgets a model's shape allows before the model has run."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kvcalib.artifact.manifest import Budget
from kvcalib.errors import InputError
from kvcalib.model.selftest import attention_layers
from kvcalib.quant.fitting import make_quantizer
from kvcalib.quant.packing import MAX_BITS
from kvcalib.quant.quantizer import Scope
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import kv_shape
from kvcalib.stages.allocate import AllocateSettings, Allocation
from kvcalib.stages.fit_nuq import ROLES, FitNuqSettings
from kvcalib.stages.options import POSITION_BITS, row_bits


def budget_range(shapes: list[tuple[int, int]], settings: FitNuqSettings) -> tuple[float, float]:
    """Effective bits of the smallest plan, which has no codes at all, and of the largest, whose codes all have 8 bits.

    Args:
        shapes: `(kv heads, head_dim)` of each layer that is packed.
    """
    fixed = [
        [_fixed_bits(*shape, settings.relative(role), o.scope, o.outliers) for o in settings.options(role, *shape)]
        for shape in shapes
        for role in ROLES
    ]
    elements = sum(len(ROLES) * heads * head_dim for heads, head_dim in shapes)
    return (sum(map(min, fixed)) + POSITION_BITS) / elements, (
        sum(map(max, fixed)) + POSITION_BITS
    ) / elements + MAX_BITS


@cache
def _fixed_bits(heads: int, head_dim: int, relative: bool, scope: Scope, outliers: float) -> int:
    """Bits of a token's row that no width changes."""
    nothing = torch.zeros(heads, head_dim, dtype=torch.uint8)
    ladders = torch.zeros(heads, head_dim, 2 ** (MAX_BITS + 1) - 1)
    return row_bits(make_quantizer(ladders, nothing, relative, scope, outliers, nothing))


def check_budget(model: Any, budget: float, settings: FitNuqSettings) -> None:
    """Refuse a budget that no plan of this model can meet, before anything is computed.

    Raises:
        InputError: names the budget, the range and the remedy.
    """
    # Layers that a run leaves out would only raise the smallest plan, by their share of the position.
    shapes = [kv_shape(model, layer) for layer in attention_layers(model)]
    smallest, largest = budget_range(shapes, settings)
    if not shapes or smallest <= budget <= largest:
        return
    remedy = "choose a budget between them"
    bare, _ = budget_range(shapes, settings.model_copy(update={"outliers": 0.0, "choices": None}))
    if bare < smallest and budget < smallest:
        remedy += f"; without outliers (fit.outliers: 0) the smallest plan takes {bare:.2f}"
    raise InputError(
        f"bits is {budget:g}; with {_shares(settings)} outliers this model's cache takes between "
        f"{smallest:.2f} effective bits (no codes at all) and {largest:.2f} (codes of 8 bits); {remedy}"
    )


def _shares(settings: FitNuqSettings) -> str:
    more = () if settings.choices is None else settings.choices.outliers
    return " or ".join(f"{100 * share:g} %" for share in sorted({settings.outliers, *more}))


def budget_of(found: Allocation) -> Budget | None:
    """What an artifact records of the budget that its widths were chosen for; None for a mean width."""
    asked = found.settings.budget
    return None if asked is None else Budget(asked=asked, planned=found.effective_bits)


def at_budget(run_dir: RunDir, bits: float) -> AllocateSettings:
    """Settings of `allocate` for `bits` effective bits: else as the run's widths were chosen, or the defaults."""
    known = (run_dir.record("allocate") or {}).get("settings", {})
    kept = {name: known[name] for name in AllocateSettings.model_fields if name in known}
    return AllocateSettings.model_validate(kept | {"budget": bits, "widths": None})
