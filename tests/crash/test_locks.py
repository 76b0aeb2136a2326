"""Two processes in one place: a run has one writer, an artifact appears once, a reader sees the old or the new."""

import os
import signal

import pytest

from kvcalib.errors import FolderInUse
from kvcalib.rundir import RunDir
from tests.crash.road import differences, tree


@pytest.mark.parametrize("stage", ["fisher", "fit-nuq", "friendliness", "allocate", "build"])
def test_second_process_in_a_run_is_refused_at_once(road, stage):
    road.put(f"after {stage}")
    with RunDir(road.work / "run").lock():
        ended = road.run(stage)
    assert ended.code == 4, ended.err
    assert len(ended.messages) == 1
    assert "another kvcalib process is working in this run; wait for it" in ended.messages[0]
    road.restart(stage, "the first has ended")


def test_readers_stand_beside_each_other_and_keep_writers_out(road):
    road.put("before build")
    with RunDir(road.work / "run").lock(shared=True):
        road.stem.ok(*road.commands["build"])
        assert road.run("fit-nuq").code == 4
    assert not (road.work / "run" / ".lock").exists()
    road.restart("build", "the readers have ended")


def test_killed_process_gives_the_lock_back(road):
    road.put("before fit-nuq")
    ended = road.run("fit-nuq", die=8)
    assert ended.code == -signal.SIGKILL
    assert (road.work / "run" / ".lock").exists()
    road.restart("fit-nuq", "killed while it held the lock")


def test_lock_of_a_killed_process_that_forked(tmp_path):
    """A lock is the kernel's, so it is free as soon as its holder is gone, whatever it left on the disk."""
    run = RunDir(tmp_path / "run", create=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with RunDir(run.path).lock():
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(FolderInUse), run.lock():
        pytest.fail("two writers")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with run.lock():
        pass


def test_one_artifact_built_by_several_processes(road):
    road.put("before build")
    ended = road.stem.together(*[road.commands["build"]] * 4)
    assert [each.code for each in ended] == [0] * 4, [each.err for each in ended]
    assert differences(tree(road.work), tree(road.home / "states" / "after build")) == []


def test_different_artifacts_in_one_place(road):
    """Without --overwrite one of them wins, and the others say so."""
    for _ in range(3):
        road.put("after build large")
        commands = [("build", road.work / "run", "--out", road.work / "new", "--key-bits", b) for b in (2, 3, 4)]
        ended = road.stem.together(*commands)
        assert sorted(each.code for each in ended) == [0, 4, 4], [each.err for each in ended]
        assert all("holds another artifact" in each.err for each in ended if each.code)
        road.stem.ok("verify", road.work / "new")
        assert [p.name for p in road.work.iterdir() if p.name.startswith(".")] == []


def test_overwriting_one_place_by_several_processes(road):
    """Each swaps the whole: the last one's artifact is there, whole."""
    for _ in range(3):
        road.put("after build large")
        commands = [
            ("build", road.work / "run", "--out", road.work / "small", "--overwrite", "--key-bits", bits)
            for bits in (2, 3, 4)
        ]
        ended = road.stem.together(*commands)
        assert [each.code for each in ended] == [0, 0, 0], [each.err for each in ended]
        road.stem.ok("verify", road.work / "small")
        assert [p.name for p in road.work.iterdir() if p.name.startswith(".")] == []
