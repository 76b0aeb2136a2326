"""Killed (-9) at random moments, and at every operation on a file: the restart ends in the bytes of a quiet run."""

import hashlib
import random
import shutil
import signal

import pytest

from tests.crash.road import tree

KILLS = 20
STAGES = (
    "fisher", "fit-nuq", "friendliness", "allocate", "build", "allocate kl", "eval", "tiers", "tiers again", "card",
    "build again", "export", "report", "fit-nuq again", "merge", "run",
)  # fmt: skip
RANDOM = (
    "fisher",
    "fit-nuq",
    "friendliness",
    "allocate",
    "allocate kl",
    "build",
    "build again",
    "eval",
    "merge",
    "run",
)
MOST = 14
"""Of stages with more states than that a sample is restarted."""


@pytest.mark.parametrize("stage", RANDOM)
def test_killed_at_random_moments(road, stage):
    draw, quiet = random.Random(stage), road.ended[stage]
    kills, phases, longest, times = 0, set(), quiet.seconds, [at for at, _ in quiet.operations]
    for attempt in range(4 * KILLS):
        road.put(f"before {stage}")
        # Two of three moments are after the first operation on files, one of these about some operation: in a small
        # model that is the shorter part.
        start = (0.0, times[0], draw.choice(times))[attempt % 3]
        last = longest if attempt % 3 < 2 else start + 0.02
        ended = road.run(stage, after=draw.uniform(min(start, longest), min(last, longest)))
        if ended.code == 0:
            # This time it was faster: the machine has less to do than before.
            longest, times = min(longest, ended.seconds), [at for at, _ in ended.operations]
            continue
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        phases.add((ended.done, ended.passes))
        road.restart(stage, f"killed after {ended.done} operations, the last {ended.operations[-1:]}")
        if kills >= KILLS and len(phases) >= 3:
            break
    assert kills >= KILLS
    assert len(phases) >= 3, f"all kills came after {sorted(phases)} (operations, passes of the model)"


@pytest.mark.parametrize("stage", STAGES)
def test_crash_before_every_operation(road, stage, tmp_path):
    road.put(f"before {stage}")
    quiet = road.run(stage, snapshots=tmp_path)
    assert quiet.code == 0, quiet.err
    states = {}
    for folder in sorted(tmp_path.iterdir()):
        states.setdefault(hashlib.sha256(repr(tree(folder)).encode()).digest(), folder)
    chosen = list(states.values())
    assert len(chosen) >= 3, "so few states cannot be all there are"
    if len(chosen) > MOST:
        chosen = random.Random(stage).sample(chosen, MOST)
    for state in chosen:
        road.put(state)
        number = int(state.name[:4])
        road.restart(stage, f"{state.name}: before {quiet.operations[number - 1][1]!r}")
        shutil.rmtree(state)


def test_at_most_one_batch_is_lost(road):
    """Killed near its end, the pass goes on where it was: the model runs the batches that are missing, no others."""
    quiet = road.ended["fisher"]
    commits = [n for n, (_, what) in enumerate(quiet.operations, 1) if what.startswith("os.rename run/parts/fisher/")]
    commits = [n for n in commits if quiet.operations[n - 1][1].endswith("state.safetensors")]
    batches = len(commits)
    assert batches == 6
    proof = quiet.passes - batches  # of the tap, each time
    for done in (1, batches - 1):
        road.put("before fisher")
        ended = road.run("fisher", die=commits[done] - 1)  # the batch after them is not committed yet
        assert ended.code == -signal.SIGKILL
        again = road.restart("fisher", f"killed after {done} batches")
        assert again.passes == proof + batches - done
        assert f"going on after {done} of {batches} sequences" in again.err
