"""The batches of one measurement, shared out over the processes of a launch and kept in a file beside its result.

The file's first line says what is measured: artifacts, model, token ids, settings. Each further line is one batch. So a
command that was killed goes on where it stood, at most one batch of each process is lost, and a file that another
measurement left is refused. It is removed when the result has been written.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from kvcalib.errors import FolderInUse, NonFiniteActivations
from kvcalib.evaluation.collect import Row
from kvcalib.files import is_stream
from kvcalib.launch import Launch
from kvcalib.rundir import difference
from kvcalib.stages.ledger import Ledger
from kvcalib.stages.progress import note


class Kept:
    """A keeper (`evaluation/collect.py`) over a launch and a file.

    Args:
        here: the processes; all of them make one with the same arguments.
        path: the file; None to keep nothing beyond this command.
        of: what is measured: everything that the rows depend on, as JSON.
        what: the command, for messages.
        discard: what another measurement left is removed, not refused.
    """

    def __init__(
        self, here: Launch, path: Path | None, of: dict[str, Any], what: str = "eval", discard: bool = False
    ) -> None:
        self.here, self.what, self.discard = here, what, discard
        self.of = json.loads(json.dumps(of))  # as it comes back from the file
        self.path = path
        self._ledger = None if path is None else Ledger(path)
        self._rows: dict[str, Row] = {}
        self._before = 0

    def step(self) -> contextlib.AbstractContextManager[None]:
        """See `Keeper`."""
        return self.here.step(self.what)

    def due(self, count: int) -> list[int]:
        """See `Keeper`.

        Raises:
            FolderInUse: the file was left by another measurement; names the first thing that differs.
        """
        with self.step():
            self._rows = self._read()
        self._rows = self.here.unite(self._rows)
        left = [number for number in range(count) if str(number) not in self._rows]
        self._before = count - len(left)
        if self._before:
            note(f"{self.what}: {self._before} of {count} batches are there, {len(left)} are left")
        if left:
            self.here.in_turn(self.what, self._begin)
        return self.here.mine(left)

    def keep(self, number: int, row: Row) -> None:
        """See `Keeper`.

        Raises:
            InputError: the file cannot be written.
        """
        self._rows[str(number)] = row
        if self._ledger is not None:
            self._ledger.append([{"batch": number, "row": row}])

    def done(self) -> int:
        """See `Keeper`; the others are taken to be as far as this process."""
        return self._before + (len(self._rows) - self._before) * self.here.size

    def rows(self) -> dict[int, Row]:
        """See `Keeper`."""
        self._rows = self.here.unite(self._rows)
        return {int(number): row for number, row in self._rows.items()}

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The file goes once the block has written its result, or has found that there is none to be had."""
        if error is None or isinstance(error, NonFiniteActivations):
            self.forget()

    def forget(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        if self._ledger is None:
            return
        told = [row["of"] for _, row in self._ledger.rows() if "of" in row]
        other = any(of != self.of for of in told)
        if other:  # to be discarded
            self.forget()
        if other or not told:
            self._ledger.append([{"of": self.of}])

    def _read(self) -> dict[str, Row]:
        found: dict[str, Row] = {}
        known = False
        if self._ledger is None:
            return found
        for number, row in self._ledger.rows():
            if isinstance(row.get("of"), dict):
                known = True
                if row["of"] != self.of:
                    if self.discard:
                        return {}
                    raise FolderInUse(
                        f"{self.path}: holds another unfinished measurement: {difference(row['of'], self.of)}; start "
                        "that one again to go on with it, delete the file, or give another --json"
                    )
            elif isinstance(row.get("row"), dict) and isinstance(row.get("batch"), int):
                if known:  # else nothing says what it is of
                    found[str(row["batch"])] = row["row"]
            else:
                raise self._ledger.damaged(number, "has neither 'of' nor 'batch' and 'row'")
        return found


def beside(result: Path | None) -> Path | None:
    """Where the batches of a measurement are kept whose result goes to the file `result`."""
    return None if result is None or is_stream(result) else result.with_name(f"{result.name}.partial.jsonl")
