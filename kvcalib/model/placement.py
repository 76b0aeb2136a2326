"""Where a model's weights go: `--max-memory` read, and devices shared among the processes of one machine.

A device is a GPU's number or `cpu`. What fits on none of them stays on disk. Sizes are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from kvcalib.errors import InputError

Device = int | str
CPU = "cpu"
SPARE = 0.9
"""Share of free memory that weights may take; the rest is for activations and statistics."""
_EXPECTED = "expected DEVICE=SIZE, a device being cpu or a GPU's number, with commas between them, as cpu=2GiB,0=20GiB"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)")
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_memory(given: str) -> dict[Device, int]:
    """`cpu=2GiB,0=20GiB` as bytes by device; 0 needs no unit.

    Raises:
        ValueError: says which part is wrong and what was expected.
    """
    found: dict[Device, int] = {}
    for part in given.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name != CPU and not (name.isascii() and name.isdigit()):
            raise ValueError(f"{part.strip()!r} does not begin with a device; {_EXPECTED}")
        device: Device = name if name == CPU else int(name)
        if device in found:
            raise ValueError(f"{name} is given twice; {_EXPECTED}")
        match = _SIZE.fullmatch(size)
        if match is None and size != "0":
            raise ValueError(f"the size of {name} is {size!r}; {_EXPECTED}")
        found[device] = 0 if match is None else int(float(match[1]) * _unit(match[2]))
    return found


def _unit(name: str) -> int:
    return int((1024 if "i" in name else 1000) ** _POWERS[name[0]])


def shared_memory(
    given: Mapping[Device, int] | None, gpus: int, process: tuple[int, int], free: Callable[[Device], int]
) -> dict[Device, int] | None:
    """What one process may use of each device of its machine; None: as accelerate shares a model out to GPUs.

    Each process has GPUs of its own, neighbours as far as they go round; where there are fewer GPUs than processes,
    some share one. Host memory is split evenly.

    Args:
        given: bytes by device for the whole machine; devices that it does not name hold nothing. None: all there are.
        gpus: how many torch sees.
        process: its number among those of this machine, and how many they are.
        free: bytes now free of a device; asked of this process' own devices only.

    Raises:
        ValueError: `given` names a GPU that is not there.
    """
    rank, count = process
    if given is None and count == 1 and gpus:
        return None
    named = sorted(d for d in given if isinstance(d, int)) if given is not None else list(range(gpus))
    if named and named[-1] >= gpus:
        raise ValueError(f"GPU {named[-1]} is named, but torch sees {gpus or 'no'} GPU")
    mine, sharers = _slice(named, rank, count)
    if given is None:
        found: dict[Device, int] = {gpu: int(SPARE * free(gpu)) // sharers for gpu in mine}
        return found | {CPU: int(SPARE * free(CPU)) // count}
    found = {gpu: given[gpu] // sharers for gpu in mine}
    return found | ({CPU: given[CPU] // count} if CPU in given else {})


def _slice(gpus: Sequence[int], rank: int, count: int) -> tuple[Sequence[int], int]:
    """The GPUs of process `rank` of `count`, and how many processes share them."""
    if len(gpus) >= count:
        return gpus[rank * len(gpus) // count : (rank + 1) * len(gpus) // count], 1
    owners = [other * len(gpus) // count for other in range(count)]
    return gpus[owners[rank] : owners[rank] + 1], owners.count(owners[rank])


def local_process(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which process of this machine this is, and how many they are, as launchers (torchrun, accelerate) say.

    Raises:
        InputError: LOCAL_RANK or LOCAL_WORLD_SIZE is no such number.
    """
    told = environment.get("LOCAL_WORLD_SIZE", "1"), environment.get("LOCAL_RANK", "0")
    if not all(text.isascii() and text.isdigit() for text in told) or int(told[0]) < 1:
        raise InputError(
            f"LOCAL_WORLD_SIZE is {told[0]!r} and LOCAL_RANK {told[1]!r}, expected how many processes, and which"
        )
    count, rank = int(told[0]), int(told[1])
    if count == 1:
        return 0, 1
    if rank >= count:
        raise InputError(f"LOCAL_RANK is {rank}, expected a number below LOCAL_WORLD_SIZE, which is {count}")
    return rank, count
