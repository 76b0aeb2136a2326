"""How the processes of one launch share a pass: which parts there are, who goes on with which, and what is left.

Every process keeps its own part (`calibration/part.py`) in the run's folder, on whatever disk it sees there. Whoever
starts next, in any number, takes the union of what the parts have, and shares out the batches that none has.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcalib.calibration.part import ROWS, STATE, Part, find_parts
from kvcalib.errors import InputError
from kvcalib.launch import Launch
from kvcalib.rundir import difference

FETCHED = "fetched"

Seen = Mapping[str, Sequence[int]]
"""Names of parts, with the batches that are done in each."""


@dataclass(frozen=True)
class Plan:
    """What the processes agree on.

    Attributes:
        kept: the parts that count, no two of which have a batch in common.
        goes_on: by rank, the part that it goes on with, or None for a new one.
        left: the batches that are in none of them.
    """

    kept: list[str]
    goes_on: list[str | None]
    left: list[int]


def agree(seen: Sequence[Seen], batches: int) -> Plan:
    """The plan for processes that see these parts, by rank: the same in all of them.

    A copy of a part that lags behind another one does not count. Of two parts that did the same batch (a machine was
    away and its batches were done again) the smaller one is given up: sums cannot be taken apart.
    """
    best = {name: max((set(one[name]) for one in seen if name in one), key=len) for one in seen for name in one}
    kept: list[str] = []
    taken: set[int] = set()
    for name in sorted(best, key=lambda name: (-len(best[name]), name)):
        if best[name] <= set(range(batches)) and not taken & best[name]:
            kept.append(name)
            taken |= best[name]
    goes_on: list[str | None] = []
    for one in seen:
        free = (name for name in kept if name not in goes_on and set(one.get(name, ())) == best[name])
        goes_on.append(next(free, None))
    return Plan(kept, goes_on, [batch for batch in range(batches) if batch not in taken])


def share(here: Launch, folder: Path, batches: int) -> tuple[Part, Plan]:
    """This process's part, and the plan of all; parts that do not count any more are removed.

    Raises:
        ProcessLost: one of the launch has ended.
    """
    parts = find_parts(folder)
    plan = agree(here.gather(_seen(parts)), batches)
    for part in parts:
        if part.name not in plan.kept:
            shutil.rmtree(part.folder, ignore_errors=True)
    name = plan.goes_on[here.rank]
    return Part(folder / (name or uuid.uuid4().hex[:12])), plan


def bring_together(here: Launch, folder: Path, batches: int) -> list[Part]:
    """All parts of a pass that is done, in the first process; the others' are fetched where it does not see them.

    Raises:
        ProcessLost: one of the launch has ended. InputError: what is fetched cannot be written, or is not all there.
    """
    seen = here.gather(_seen(find_parts(folder)))
    plan = agree(seen, batches)
    if plan.left:
        error = InputError(
            f"{folder}: {len(plan.left)} batches are in no part, though all were done; the folder has changed while "
            "the run was working: start the same command again"
        )
        error.shared = True
        raise error
    found = []
    for name in sorted(plan.kept):
        most = max(len(one.get(name, ())) for one in seen)
        owner = next(rank for rank, one in enumerate(seen) if len(one.get(name, ())) == most)
        if owner:
            for file in (ROWS, STATE):
                here.fetch(folder / name / file, owner, folder / FETCHED / name / file)
        found.append(folder / FETCHED / name if owner else folder / name)
    return [Part(path) for path in found] if here.first else []


def check_agreement(here: Launch, recorded: Mapping[str, Any]) -> None:
    """InputError, in all processes, if one of them would calibrate something else."""
    told = here.gather(recorded)
    for rank, other in enumerate(told):
        if other != told[0]:
            error = InputError(
                f"fisher: processes disagree: the first one has {difference(told[0], other)} in process {rank}; give "
                "all of them the same model, text, devices and versions"
            )
            error.shared = True
            raise error


def _seen(parts: Sequence[Part]) -> dict[str, list[int]]:
    return {part.name: sorted(part.done) for part in parts}
