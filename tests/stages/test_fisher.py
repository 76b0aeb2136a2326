"""The stage with one process and with many: the same bytes, whoever did what, killed and resumed or not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcalib.calibration.part import Part, find_parts
from kvcalib.calibration.statistics import Calibration
from kvcalib.demo import MODEL_DIR
from kvcalib.errors import FolderInUse, InputError
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages import fisher
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fisher_parts import Plan, agree
from tests.launched import DIED, together
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[2]
SEQUENCES, LENGTH = 10, 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a text and the run of one process."""
    folder = tmp_path_factory.mktemp("fisher")
    tiny_llama(vocab_size=2048).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / "model")
    write_text(folder / "text.jsonl", SEQUENCES)
    settings(folder)
    fisher.run(RunDir(folder / "alone", create=True), str(folder / "model"), settings(folder))
    return folder


def write_text(path, sequences, length=LENGTH, seed=0):
    rows = np.random.default_rng(seed).integers(3, 2048, (sequences, length)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def settings(home, **changes):
    given = {"data": str(home / "text.jsonl"), "samples": SEQUENCES, "seq_len": LENGTH, "keep_tokens": 100,
             "batch_size": 1} | changes  # fmt: skip
    return FisherSettings(**given)


def calibrated(here, home, run, own=False, kill=None, **changes):
    """What every process of a launch does; the one of rank `kill` is killed in its second batch."""
    folder = run / str(here.rank) if own else run
    if here.rank == kill:
        commit = Part.commit

        def last(part, *arguments):
            if part.done:
                os.kill(os.getpid(), signal.SIGKILL)
            commit(part, *arguments)

        Part.commit = last
    run_dir = here.in_turn("test", lambda: RunDir(folder, create=True))
    record = fisher.run(run_dir, str(home / "model"), settings(home, **changes), here=here)
    return record if record is None else record.info.sequences


def same(run, home):
    return (run / CALIBRATION).read_bytes() == (home / "alone" / CALIBRATION).read_bytes()


def left_over(run):
    return sorted(p.name for p in run.iterdir())


def done_in(run):
    return sorted(batch for part in find_parts(run / "parts" / "fisher") for batch in part.done)


def pair(here, home, tmp):
    """Everything that two processes are asked, in one launch."""
    found = {"common": calibrated(here, home, tmp / "common"), "own": calibrated(here, home, tmp / "own", own=True)}
    write_text(tmp / f"text{here.rank}.jsonl", SEQUENCES, seed=1 + here.rank)
    for name, changes in (
        ("again", {}),
        ("other", {"seed": 1}),
        ("text", {"data": str(tmp / f"text{here.rank}.jsonl"), "seed": 1}),
        ("lacking", {"data": str(home / "text.jsonl" if here.rank else tmp / "none.jsonl")}),
    ):
        try:
            found[name] = calibrated(here, home, tmp / "common", **changes)
        except (InputError, FolderInUse) as error:
            found[name] = f"{type(error).__name__}: {error} {error.shared}"
    return found


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, together(2, pair, home, folder)


def test_two_processes_end_in_the_bytes_of_one(two, home):
    folder, found = two
    assert [one["common"] for one in found] == [SEQUENCES, SEQUENCES]
    assert same(folder / "common", home)
    assert left_over(folder / "common") == [CALIBRATION, "run.json", "stages"]
    records = [(run / "stages" / "fisher.json").read_bytes() for run in (folder / "common", home / "alone")]
    assert records[0] == records[1]


def test_processes_with_disks_of_their_own(two, home):
    folder, found = two
    assert [one["own"] for one in found] == [SEQUENCES, None]
    assert same(folder / "own" / "0", home)
    assert left_over(folder / "own" / "1") == ["run.json"]


def test_what_is_up_to_date_is_not_made_again_and_other_settings_are_refused(two):
    found = two[1]
    assert [one["again"] for one in found] == [SEQUENCES, SEQUENCES]
    for one in found:
        assert re.search("FolderInUse: .*holds another run: fisher ran with seed=0, now 1", one["other"])


def test_processes_that_disagree_or_lack_a_file_all_say_so(two):
    for one in two[1]:
        assert re.match("InputError: fisher: processes disagree: the first one has data=.*text0.*text1", one["text"])
        assert re.match(r"InputError: .*none\.jsonl.*: no such file", one["lacking"])
        assert one["text"].endswith("True")


def test_one_of_four_killed_and_resumed_by_one_and_by_two(home, tmp_path):
    found = together(4, calibrated, home, tmp_path / "run", False, 2)
    assert found[2] == DIED
    lost = r"ProcessLost: .*another process of this launch has ended; what was finished is saved"
    assert all(re.match(lost, one) for rank, one in enumerate(found) if rank != 2), found
    # Ten batches among four: rank 2 had 2 and 6, and was killed before it had 6.
    assert done_in(tmp_path / "run") == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert together(2, calibrated, home, tmp_path / "copy") == [SEQUENCES, SEQUENCES]
    assert same(tmp_path / "copy", home)
    run = RunDir(tmp_path / "run")
    with pytest.raises(FolderInUse, match="unfinished run: fisher was started with window=5, now 4"):
        fisher.run(run, str(home / "model"), settings(home, window=4))
    assert len(done_in(tmp_path / "run")) == 9
    fisher.run(run, str(home / "model"), settings(home))
    assert same(tmp_path / "run", home)


@pytest.mark.parametrize("moment", ["rows", "state", "file", "record"])
def test_killed_at_a_moment_and_resumed(home, tmp_path, moment):
    """Half a batch of rows written; the state half written; all done but the file; the file there but not recorded."""
    run = RunDir(tmp_path / "run", create=True)
    folder = tmp_path / "run" / "parts" / "fisher"
    assert together(1, stopped, home, tmp_path / "run", 10 if moment in ("file", "record") else 4) == [DIED]
    (part,) = (p.folder for p in find_parts(folder))
    if moment == "rows":
        with open(part / "rows", "ab") as file:
            file.write(b"x" * 1000)
    elif moment == "state":
        (part / ".state.safetensors.1.tmp").write_bytes(b"x" * 10)
    elif moment == "record":
        run.file(CALIBRATION).write_bytes(b"half")
    fisher.run(run, str(home / "model"), settings(home))
    assert same(tmp_path / "run", home)
    assert left_over(tmp_path / "run") == [CALIBRATION, "run.json", "stages"]


def stopped(here, home, run, after):
    """Killed right after `after` batches, wherever it is then."""
    commit = Part.commit

    def then_die(part, *arguments):
        commit(part, *arguments)
        if len(part.done) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Part.commit = then_die
    calibrated(here, home, run)


def test_damaged_state_is_done_again(home, tmp_path):
    run = RunDir(tmp_path / "run", create=True)
    assert together(1, stopped, home, tmp_path / "run", 4) == [DIED]
    (part,) = find_parts(tmp_path / "run" / "parts" / "fisher")
    (part.folder / "state.safetensors").write_bytes(b"\x00" * 100)
    fisher.run(run, str(home / "model"), settings(home))
    assert same(tmp_path / "run", home)


def test_accelerate_launch(home, tmp_path):
    """With --multi_gpu, on CPUs too: with --cpu accelerate starts one process, whatever it is told."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m",
               "kvcalib", "fisher", str(home / "model"), "--run", str(tmp_path / "run"),
               "--data", str(home / "text.jsonl"),
               "--samples", str(SEQUENCES), "--seq-len", str(LENGTH), "--keep-tokens", "100",
               "--batch-size", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "2 processes share 10 batches" in done.stderr
    assert done.stdout.count("10 sequences, 320 tokens") == 1
    assert same(tmp_path / "run", home)


# What the processes agree on


def test_nothing_done_yet():
    assert agree([{}, {}], 3) == Plan([], [None, None], [0, 1, 2])


def test_parts_go_to_those_that_see_them_and_what_none_has_is_left():
    seen = [{"a": [0, 4], "b": [1]}, {"a": [0, 4], "b": [1]}, {"c": [2, 3, 5]}]
    assert agree(seen, 8) == Plan(["c", "a", "b"], ["a", "b", "c"], [6, 7])
    assert agree(seen[:1], 8) == Plan(["a", "b"], ["a"], [2, 3, 5, 6, 7])
    assert agree([seen[0], seen[2], {}, {}], 6) == Plan(["c", "a", "b"], ["a", "c", None, None], [])


def test_a_copy_that_lags_behind_does_not_go_on():
    assert agree([{"a": [0]}, {"a": [0, 2]}], 4) == Plan(["a"], [None, "a"], [1, 3])


def test_no_batch_counts_twice():
    assert agree([{"a": [0, 1], "b": [1, 2, 3], "c": [4]}], 6) == Plan(["b", "c"], ["b"], [0, 5])


def test_batches_that_the_pass_does_not_have():
    assert agree([{"a": [0, 9]}], 3) == Plan([], [None], [0, 1, 2])


# Memory


def peak(here, folder, sequences):
    """Bytes of memory that calibrating took at most."""
    given = FisherSettings(data=str(folder / f"{sequences}.jsonl"), samples=sequences, seq_len=512, batch_size=1)
    fisher.run(RunDir(folder / f"run{sequences}", create=True), str(folder / "model"), given)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def test_memory_does_not_grow_with_the_text(tmp_path, home):
    shutil.copytree(home / "model", tmp_path / "model")
    wide = tiny_llama(vocab_size=2048, num_key_value_heads=8, num_attention_heads=8, head_dim=64)
    wide.save_pretrained(tmp_path / "model")
    peaks = []
    for sequences in (4, 16):
        write_text(tmp_path / f"{sequences}.jsonl", sequences, 512)
        peaks += together(1, peak, tmp_path, sequences)
    record, _ = Calibration.load(tmp_path / "run16" / CALIBRATION)
    assert len(record.tensors["sample.hash"]) == 16 * 512
    # All of the text is in the sample, which alone is more than the memory may grow by.
    assert (tmp_path / "run16" / CALIBRATION).stat().st_size > 0.2 * peaks[0]
    assert peaks[1] < 1.05 * peaks[0], peaks
