"""A full disk, a limit on the size of files, a read-only folder: one message, and what was there is there still."""

import re

import pytest

from tests.crash.road import differences, tree
from tests.crash.stem import may_mount

# Stages with their first own output, for the message must name a file of it, and the sizes are of its files.
STAGES = (
    "fisher", "fit-nuq", "fit-nuq again", "friendliness", "allocate", "allocate kl", "build", "build again", "eval",
    "tiers again", "merge", "card", "export", "report",
)  # fmt: skip
BLOCK = 4096
ROOM = (0.0, 0.5)


@pytest.fixture(scope="module")
def mounts():
    if not may_mount():
        pytest.skip("no right to mount file systems here (it takes root on Linux)")


def blocks(state: dict[str, bytes | None]) -> int:
    """Bytes that a state takes on a disk of whole blocks."""
    return sum(-(-len(content) // BLOCK) * BLOCK for content in state.values() if content)


def refused(ended, work, pattern: str) -> None:
    """One message with exit code 2 that names a file below `work`, and no traceback."""
    assert ended.code == 2, f"exit code {ended.code}: {ended.err}"
    assert len(ended.messages) == 1, ended.err
    assert "Traceback" not in ended.err
    assert re.search(rf"error: {re.escape(str(work))}/\S+: {pattern}", ended.messages[0]), ended.messages[0]


def intact(found: dict[str, bytes | None], before: dict[str, bytes | None]) -> None:
    """What was there is there, byte for byte; beside it only parts, and lines of ledgers, of what is finished."""
    for name, content in before.items():
        if name.endswith(".jsonl"):
            assert found[name].startswith(content), name
        else:
            assert found.get(name, b"missing") == content, name
    new = set(found) - set(before)
    assert not [name for name in new if name.endswith(".tmp") or "staged" in name or name.endswith(".lock")], new


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk(mounts, road, stage, tmp_path):
    before, after = (tree(road.home / "states" / f"{when} {stage}") for when in ("before", "after"))
    grown = blocks({name: content for name, content in after.items() if before.get(name) != content})
    for number, share in enumerate(ROOM):
        road.put(f"before {stage}")
        room = max(BLOCK, blocks(before) + int(share * grown) // BLOCK * BLOCK)  # no bytes are no limit to tmpfs
        ended = road.run(stage, room=room, keep=tmp_path / str(number))
        refused(ended, road.work, "the disk is full, nothing was changed.*; free space")
        intact(tree(tmp_path / str(number)), before)
        road.put(tmp_path / str(number))
        road.restart(stage, f"with room for {share:.0%}")


@pytest.mark.parametrize("stage", STAGES)
def test_files_may_not_grow(road, stage):
    before, after = (tree(road.home / "states" / f"{when} {stage}") for when in ("before", "after"))
    largest = max(len(content) for name, content in after.items() if content and before.get(name) != content)
    for limit in (0, largest // 2):
        road.put(f"before {stage}")
        ended = road.run(stage, limit=limit)
        refused(ended, road.work, r"too large for this disk or for the limit of this process.*ulimit -f")
        intact(tree(road.work), before)
    road.restart(stage, "after a limit on the size of files")


@pytest.mark.parametrize("stage", STAGES)
def test_read_only_folder(mounts, road, stage):
    road.put(f"before {stage}")
    refused(road.run(stage, readonly=True), road.work, r"not writable \(Read-only file system\); choose another folder")
    assert differences(tree(road.work), tree(road.home / "states" / f"before {stage}")) == []
