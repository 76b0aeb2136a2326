"""The processes of one launch: which of them this is, and how they meet.

`accelerate launch -m kvcalib ...` (or torchrun) starts several processes of one command, on one machine or many. Each
works on its own share. What one has to know of the others goes through `Launch`, as JSON over gloo, on GPUs too:
results lie on disk or are small, so none of it needs NCCL. Without a launcher there is one process, and all of this is
free.

    with launch.here().step("fisher"):        # an error of one process is raised in all of them
        ...
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcalib import errors
from kvcalib.errors import InputError, KvcalibError, ProcessLost
from kvcalib.files import hash_file, write_error

T = TypeVar("T")
LONGEST_WAIT = datetime.timedelta(days=7)
"""A lost process closes its connections, which is noticed at once; a slow one may be waited for."""
CHUNK = 64 << 20
"""Bytes of a file that travel at a time."""


@dataclass(frozen=True)
class Launch:
    """One process among `size` of a launch; `local_rank` of `local_size` on its machine.

    Attributes:
        device: the torch device that is this process's own, None to choose as a single process would.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: str | None = None
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what all have in common."""
        return self.rank == 0

    def own_device(self, chosen: str) -> str:
        """The torch device to load a model on: this process's own where `chosen` is auto, else `chosen`."""
        return self.device or chosen if chosen == "auto" else chosen

    @property
    def cores(self) -> int:
        """How many of this machine's cores are this process's share, at least 1."""
        return max(1, (os.cpu_count() or 1) // self.local_size)

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: every `size`-th."""
        return list(items[self.rank :: self.size])

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, by rank, in all of them.

        Raises:
            ProcessLost: one of them has ended.
        """
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._talking():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            torch.distributed.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            room = max(int(size) for size in sizes)
            found = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.nn.functional.pad(own, (0, room - len(own)))
            torch.distributed.all_gather(found, padded, group=self.group)
        return [json.loads(x[: int(n)].numpy().tobytes()) for x, n in zip(found, sizes, strict=True)]

    def same(self, value: Any) -> Any:
        """The first process's JSON `value`, in all of them."""
        return self.gather(value if self.first else None)[0]

    def unite(self, known: dict[str, Any]) -> dict[str, Any]:
        """What any process knows, JSON values by key, in all of them; of several values the lowest rank's."""
        if self.size == 1:
            return known
        held = [set(keys) for keys in self.gather(sorted(known))]
        everywhere = set.intersection(*held)
        earlier = set().union(*held[: self.rank])
        sent = self.gather({key: value for key, value in known.items() if key not in everywhere | earlier})
        return known | {key: value for part in sent for key, value in part.items()}

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A block that every process runs and leaves together; an error of one is raised in all.

        Raises:
            KvcalibError: the block's own, else that of the lowest rank which had one. ProcessLost: one has ended.
        """
        failed: KvcalibError | None = None
        try:
            yield
        except ProcessLost:
            raise
        except KvcalibError as error:
            if self.size == 1:
                raise
            failed = error
        if self.size == 1:
            return
        told = self.gather(None if failed is None else [type(failed).__name__, str(failed)])
        others = [(rank, said) for rank, said in enumerate(told) if said]
        if not others:
            return
        rank, (kind, message) = others[0]
        if failed is None or rank != self.rank:
            failed = getattr(errors, kind, KvcalibError)(f"{what}: process {rank} of {self.size}: {message}")
        # The first process says it, whoever met it.
        failed.shared = True
        raise failed

    @contextlib.contextmanager
    def holding(self, what: str, lock: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
        """A block that all processes run while the first one holds `lock()`; if it cannot be had, all raise."""
        with contextlib.ExitStack() as stack:
            with self.step(what):
                if self.first:
                    stack.enter_context(lock())
            yield

    def in_turn(self, what: str, make: Callable[[], T]) -> T:
        """`make()` by the first process, then by the others: for what the first creates and the others find.

        On other machines, which may have a disk of their own, the first one there goes before its neighbours.
        """
        made: list[T] = []
        turn = 0 if self.first else 1 if self.local_rank == 0 else 2
        for now in range(3):
            with self.step(what):
                if now == turn:
                    made.append(make())
        return made[0]

    def shares(self, folder: Path) -> bool:
        """Whether all processes see `folder` as the first one does (one disk), or some have their own."""
        return not any(self.disks(folder))

    def disks(self, folder: Path) -> list[int]:
        """For each process the lowest rank that sees `folder` on the same disk as it does; the folder is there."""
        if self.size == 1:
            return [0]
        name = self.same(uuid.uuid4().hex)
        signs = [folder / f".launch-{name}-{rank}" for rank in range(self.size)]
        with self.step("launch"):
            try:
                signs[self.rank].touch()
            except OSError as error:
                raise write_error(signs[self.rank], error) from error
        lowest = self.gather(next(rank for rank, sign in enumerate(signs) if sign.exists()))
        signs[self.rank].unlink(missing_ok=True)
        return [int(rank) for rank in lowest]

    def supply(self, folder: Path, names: Sequence[str]) -> None:
        """Make the files `names` of `folder` those of the first process's folder, on every disk that is not its own.

        Raises:
            ProcessLost: one process has ended. InputError: a file cannot be written.
        """
        others = sorted(set(self.disks(folder)) - {0}) if self.size > 1 else []
        for name in names if others else ():
            path, mine = folder / name, self.first or self.rank in others
            told = self.gather(hash_file(path) if mine and path.is_file() else None)
            for rank in others:
                if told[0] is None and self.rank == rank:
                    path.unlink(missing_ok=True)
                elif told[0] not in (None, told[rank]):
                    self.fetch(path, 0, path, rank)

    def supply_folder(self, folder: Path) -> None:
        """`supply` of all files that the first process has in `folder`, which the others make if they lack it."""
        if self.size == 1:
            return
        with self.step("launch"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(folder, error) from error
        names = self.same([str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()])
        self.supply(folder, names)

    def fetch(self, source: Path | None, rank: int, target: Path, to: int = 0) -> None:
        """Copy the file `source` of process `rank` to `target` of process `to`, whole or not; all processes call it.

        Raises:
            ProcessLost: one of them has ended. InputError: `target` cannot be written.
        """
        if rank == to:
            raise ValueError(f"fetch: rank and to are {rank}, whose files are there already")
        size = self.gather(source.stat().st_size if self.rank == rank and source is not None else None)[rank]
        if self.rank == rank and source is not None:
            with open(source, "rb") as file, self._talking():
                while block := file.read(CHUNK):
                    torch.distributed.send(torch.frombuffer(bytearray(block), dtype=torch.uint8), to, group=self.group)
        failed: OSError | None = None
        if self.rank == to:
            with contextlib.ExitStack() as stack:
                file_: Any = None
                part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file_ = stack.enter_context(open(part, "wb"))
                except OSError as error:
                    failed = error
                for start in range(0, size, CHUNK):
                    block_: Tensor = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
                    with self._talking():
                        torch.distributed.recv(block_, rank, group=self.group)
                    try:
                        if failed is None:
                            file_.write(block_.numpy().tobytes())
                    except OSError as error:  # what is under way is received all the same
                        failed = error
            try:
                if failed is None:
                    os.replace(part, target)
                else:
                    part.unlink(missing_ok=True)
            except OSError as error:
                failed = failed or error
        with self.step("launch"):
            if failed is not None:
                raise write_error(target, failed, size)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that gloo raises
            raise ProcessLost(
                f"process {self.rank} of {self.size}: another process of this launch has ended; what was finished is "
                "saved: start the same command again to go on, with as many processes as you like"
            ) from error


@functools.cache
def here() -> Launch:
    """What the launcher says of this process; the first call meets the others."""
    if launched_size() <= 1:
        return Launch()
    from accelerate import PartialState

    # Without GPUs accelerate takes a launch for a single process unless it is told of the CPU.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    _end_politely(state.local_process_index)
    return Launch(
        state.process_index,
        state.num_processes,
        state.local_process_index,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        str(state.device),
        torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT),
    )


def met() -> bool:
    """Whether the processes of this launch have met: `here` was called."""
    return here.cache_info().currsize > 0


def launched_size() -> int:
    """How many processes the launcher's environment names; 1 without one.

    Raises:
        InputError: it is no number.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(given)
    except ValueError:
        raise InputError(f"WORLD_SIZE is {given!r}, expected a number; start with `accelerate launch`") from None


def launched_rank() -> int:
    """This process's rank by the launcher's environment, before anybody has met; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if launched_size() > 1 else 0


def _end_politely(local_rank: int) -> None:
    """When a launcher ends the others after one has died, one of those that are left says what to do."""

    def end(*_: object) -> None:
        if local_rank < 2:  # two, since the one that died may be one of them
            print(
                "error: this launch is being ended, probably because one of its processes died (its own message or "
                "signal is above or below); what was finished is saved: start the same command again to go on",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        os._exit(143)

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, end)
