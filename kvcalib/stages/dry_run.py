"""What a run would take, before it runs: reads the config only, times this machine for a moment, and says what fits.

No weight and no text is read. The text is taken to be as long as asked for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from kvcalib import launch
from kvcalib.errors import DoesNotFit, UnsupportedModel
from kvcalib.model.footprint import Dimensions, dimensions
from kvcalib.model.loading import pick_device
from kvcalib.report.words import size
from kvcalib.stages.cost_model import Cost, Plan, Rates, costs, saved_bytes, weight_bytes
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings

PROBE_SECONDS = 0.2
PROBE_SIDE, PROBE_ELEMENTS = 1024, 1 << 24
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Bytes that this machine has: of host memory in all and free, free on the device (0: none) and on the disk."""

    host: float
    host_free: float
    device: float
    disk: float
    device_name: str


@dataclass(frozen=True)
class Estimate:
    """The plan, its stages' costs, and the machine that they are to fit."""

    plan: Plan
    costs: list[Cost]
    rates: Rates
    machine: Machine
    folder: Path

    @property
    def seconds(self) -> float:
        """Of all stages, one after another."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def host(self) -> float:
        """Most host memory of any stage, of all processes on this machine together."""
        return max(cost.host for cost in self.costs) * self.plan.local

    @property
    def device(self) -> float:
        """Most device memory of any stage."""
        return max(cost.device for cost in self.costs)

    @property
    def disk(self) -> float:
        """Most disk at any moment: what the stages before have left, and what one needs while it works."""
        peak = kept = 0.0
        for cost in self.costs:
            peak = max(peak, kept + cost.disk + cost.scratch)
            kept += cost.disk
        return peak

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            DoesNotFit: names what is short, how much there is, how much it takes, and what to change.
        """
        plan, machine = self.plan, self.machine
        if self.disk > machine.disk:
            raise DoesNotFit(
                f"{self.folder}: {size(machine.disk)} of disk are free, the run takes {size(self.disk)}; choose "
                "another folder, or a smaller --keep-tokens"
            )
        if plan.fisher.device == "map":
            return  # weights go to where there is room, to disk if need be
        if plan.on_gpu and self.device > machine.device:
            remedy = "give --device map to spread the model over all devices"
            if saved_bytes(plan) > weight_bytes(plan):
                remedy = f"{_smaller(plan)}, or {remedy}"
            raise DoesNotFit(
                f"{machine.device_name}: has {size(machine.device)} of memory, a pass takes "
                f"{size(self.device)} ({size(weight_bytes(plan))} of weights); {remedy}"
            )
        if self.host > machine.host:
            worst = max(self.costs, key=lambda cost: cost.host).stage
            remedy = (
                _smaller(plan)
                if worst == "fisher" and saved_bytes(plan) > weight_bytes(plan)
                else ("fewer processes on this machine" if plan.local > 1 else "a machine with more, or --device map")
            )
            raise DoesNotFit(
                f"host memory: this machine has {size(machine.host)}, {worst} takes {size(self.host)} "
                f"({size(weight_bytes(plan) * (not plan.on_gpu))} of weights); {remedy}"
            )


def _smaller(plan: Plan) -> str:
    if plan.rows > 1:
        return f"give a smaller --batch-size (now {plan.rows})"
    return f"give a smaller --seq-len (now {plan.fisher.seq_len})"


def run(
    model_name: str,
    fisher: FisherSettings,
    folder: Path,
    fit: FitNuqSettings | None = None,
    evaluate: EvalSettings | None = None,
) -> Estimate:
    """What `kvcalib run` with these settings takes in every stage; `folder` is where the run would lie.

    Raises:
        InputError: no config, or the device is not there. UnsupportedModel: no layer of the model can be quantized.
    """
    found = dimensions(model_name, fisher.revision, fisher.trust_remote_code)
    here = launch.here()
    device = pick_device("auto" if fisher.device == "map" else fisher.device)
    plan = Plan(
        model=found,
        fisher=fisher,
        fit=fit or FitNuqSettings(),
        evaluate=evaluate or EvalSettings(),
        layers=_layers(found, fisher.sliding),
        dtype=_itemsize(found, fisher.dtype, device),
        on_gpu=device.type == "cuda",
        processes=here.size,
        local=here.local_size,
    )
    rates = measured_rates(device, plan.dtype)
    return Estimate(plan, costs(plan, rates), rates, machine(device, folder), folder)


def _layers(found: Dimensions, sliding: str) -> dict[int, tuple[int, int, int | None]]:
    """The layers that `fisher` would calibrate; see `stages.fisher.choose_layers`."""
    full = {index: shape for index, shape in found.layers.items() if shape[2] is None}
    chosen = found.layers if sliding == "yes" or (sliding == "auto" and not full) else full
    if not chosen:
        raise UnsupportedModel(
            f"model_type {found.family!r}: none of its {found.depth} layers attends in full, so nothing would be "
            "quantized; use --sliding yes to quantize inside the windows"
        )
    return chosen


def _itemsize(found: Dimensions, dtype: str, device: torch.device) -> int:
    if dtype == "auto":
        return 4 if device.type == "cpu" else found.stored
    return getattr(torch, dtype).itemsize if hasattr(torch, dtype) else 4


def measured_rates(device: torch.device, itemsize: int) -> Rates:
    """How fast `device` multiplies matrices and copies memory, from a fraction of a second of each."""
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    a, b = (torch.randn(PROBE_SIDE, PROBE_SIDE, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(PROBE_ELEMENTS, device=device) for _ in range(2))
    flops = 2.0 * PROBE_SIDE**3 * _per_second(lambda: a @ b, device)
    copied = 4.0 * PROBE_ELEMENTS * _per_second(lambda: target.copy_(source), device)
    return Rates(flops, copied, torch.get_num_threads() * launch.here().local_size)


def _per_second(once: Callable[[], object], device: torch.device) -> float:
    once()
    count, began = 0, time.perf_counter()
    while True:
        once()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (passed := time.perf_counter() - began) > PROBE_SECONDS:
            return count / passed


def machine(device: torch.device, folder: Path) -> Machine:
    """What is there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    memory = psutil.virtual_memory()
    total, available = _contained(memory.total, memory.available)
    free, name = 0.0, "no GPU"
    if device.type == "cuda":
        free, name = float(torch.cuda.mem_get_info(device)[0]), torch.cuda.get_device_name(device)
    return Machine(total, available, free, shutil.disk_usage(place).free, name)


def _contained(total: float, available: float) -> tuple[float, float]:
    """Host memory, and what is free of it, within the limit of a container (cgroup version 2) if there is one."""
    try:
        limit, used = (float((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or "max"
        return float(total), float(available)
    return min(total, limit), min(available, max(0.0, limit - used))
