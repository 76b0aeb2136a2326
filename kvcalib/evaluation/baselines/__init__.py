"""Other ways to keep a KV cache, each on real packed storage and counted in every byte: one method, one file.

    contender = find("kivi:bits=2:group=32:residual=128")

A new one subclasses `Baseline` in a file of its own and is named in `KINDS`; docs/baselines.md has the steps.
"""

from __future__ import annotations

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines.baseline import Baseline
from kvcalib.evaluation.baselines.calibrated import Calibrated, LayerSample
from kvcalib.evaluation.baselines.hf_hqq import HfHqq
from kvcalib.evaluation.baselines.hf_quanto import HfQuanto
from kvcalib.evaluation.baselines.integer import Integer
from kvcalib.evaluation.baselines.kivi import Kivi
from kvcalib.evaluation.baselines.kvquant import KvquantPublished
from kvcalib.evaluation.baselines.nf import NormalFloat
from kvcalib.evaluation.baselines.qaq import QaqPublished
from kvcalib.evaluation.baselines.qhitter import QhitterPublished
from kvcalib.evaluation.baselines.turboquant import TurboQuant
from kvcalib.evaluation.contender import Contender, Unquantized

KINDS: tuple[type[Baseline], ...] = (
    HfHqq,
    HfQuanto,
    Kivi,
    Integer,
    NormalFloat,
    TurboQuant,
    KvquantPublished,
    QaqPublished,
    QhitterPublished,
)
BASELINES: dict[str, type[Baseline]] = {kind.label: kind for kind in KINDS}
NAMES: tuple[str, ...] = (Unquantized.name, *BASELINES)
"""The names that a spec may begin with."""
CALIBRATES: tuple[str, ...] = tuple(name for name, kind in BASELINES.items() if kind.calibrates)
"""Those of them that need `Calibrated`."""

__all__ = ["BASELINES", "CALIBRATES", "NAMES", "Baseline", "Calibrated", "LayerSample", "find"]


def find(spec: str, calibrated: Calibrated | None = None) -> Contender:
    """The contender of a spec: `name`, or `name:setting=value:setting=value`.

    Args:
        calibrated: for those that are fitted to a model (`CALIBRATES`); others do not look at it.

    Raises:
        InputError: no baseline, setting or value of that name; or a calibration is needed and there is none.
    """
    name, *parts = spec.strip().split(":")
    if name not in NAMES:
        raise InputError(f"baseline is {name!r} (in {spec!r}), expected one of: {', '.join(NAMES)}")
    texts: dict[str, str] = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not equals or not setting or setting in texts:
            wrong = "is given twice" if setting in texts else "is not setting=value"
            raise InputError(f"baseline {spec!r}: {part!r} {wrong}; write a spec as {name}:setting=value:setting=value")
        texts[setting] = value
    if name == Unquantized.name:
        if texts:
            raise InputError(f"baseline {spec!r}: {name} has no settings; write {name!r}")
        return Unquantized()
    return BASELINES[name].parse(texts, calibrated)
