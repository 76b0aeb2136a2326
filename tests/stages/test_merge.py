"""Runs of machines that never met, joined: the tensors of one run, in any order, and what does not go together."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvcalib.calibration.statistics import Calibration
from kvcalib.cli import app
from kvcalib.demo import MODEL_DIR
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import read_tensors, write_tensors
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages import fisher, fit_nuq, merge
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.measure import MeasureSettings, Subject
from tests.tiny import as_of, tiny_llama

LENGTH = 32
ROWS = np.random.default_rng(0).integers(3, 2048, (12, LENGTH))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and runs over all of a text (`whole`) and over its parts (`a`, `b`, `c`)."""
    folder = tmp_path_factory.mktemp("merge")
    tiny_llama(vocab_size=2048).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / "model")
    for name, rows in (("whole", ROWS), ("a", ROWS[:4]), ("b", ROWS[4:6]), ("c", ROWS[6:])):
        calibrate(folder, name, rows)
    return folder


def calibrate(home, name, rows, model="model", **changes):
    text = home / "text" / name / "text.jsonl"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    given = {"data": str(text), "samples": 12, "seq_len": rows.shape[1], "keep_tokens": 100, "batch_size": 2} | changes
    fisher.run(RunDir(home / name, create=True), str(home / model), FisherSettings(**given))


def content(run):
    return read_tensors(run / CALIBRATION)


def merged(home, names, out):
    merge.run([home / name for name in names], out)
    return (out / CALIBRATION).read_bytes()


def test_parts_make_the_tensors_of_the_whole(home, tmp_path):
    merged(home, "abc", tmp_path / "all")
    (found, note), (expected, whole) = content(tmp_path / "all"), content(home / "whole")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    apart = {name for name in whole["info"] if whole["info"][name] != note["info"][name]}
    assert apart == {"data", "fingerprint", "merged"}


def test_any_order_and_grouping_gives_the_same_bytes(home, tmp_path):
    expected = merged(home, "abc", tmp_path / "abc")
    for k, order in enumerate(itertools.permutations("abc")):
        assert merged(home, order, tmp_path / str(k)) == expected
    merged(home, "ca", tmp_path / "ca")
    # A run that is merged itself, and a calibration file without its run.
    assert merged(home, [tmp_path / "ca", home / "b" / CALIBRATION], tmp_path / "grouped") == expected


def test_the_merged_run_goes_on_as_any_other(home, tmp_path):
    done = CliRunner().invoke(app, ["merge", *(str(home / n) for n in "abc"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "12 sequences, 384 tokens" in done.stdout
    codebooks = fit_nuq.run(RunDir(tmp_path / "run"), fit_nuq.FitNuqSettings())
    expected = fit_nuq.run(RunDir(home / "whole"), fit_nuq.FitNuqSettings())
    assert all(torch.equal(codebooks.tensors[name], t) for name, t in expected.tensors.items())
    with pytest.raises(FolderInUse, match="holds another run: fisher ran with"):
        calibrate(home, tmp_path / "run", ROWS)
    before = (tmp_path / "run" / CALIBRATION).stat().st_mtime_ns
    merge.run([home / "b", home / "c", home / "a"], tmp_path / "run")
    assert (tmp_path / "run" / CALIBRATION).stat().st_mtime_ns == before
    with pytest.raises(FolderInUse, match="fisher ran with"):
        merge.run([home / "a", home / "b"], tmp_path / "run")


def test_text_that_is_in_two_of_them_is_refused(home, tmp_path):
    for names in ("aa", "abb", ("whole", "b")):
        with pytest.raises(InputError, match=r"cannot merge: \d+ of the \d+ sequences of .* would count twice"):
            merge.run([home / name for name in names], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 1 in .*other.* and 0 in"),
        ({"window": 4}, "window is 4"),
        ({"keep_tokens": 50}, "keep_tokens is 50"),
        ({"dtype": "bfloat16"}, r"layers\.0\.sample\.key is .*bfloat16.*same --dtype"),
        ({"rows": ROWS[:, :16]}, "seq_len is 16"),
        ({"model": "another"}, "weights_sha256 differ"),
    ],
)
def test_what_does_not_go_together(home, tmp_path, changes, message):
    if "model" in changes and not (home / "another").exists():
        shutil.copytree(home / "model", home / "another")
        tiny_llama(1, vocab_size=2048).save_pretrained(home / "another")
    name = f"other-{next(iter(changes))}"
    calibrate(home, name, **({"rows": ROWS + 1} | changes))
    with pytest.raises(InputError, match=f"cannot merge: .*{message}"):
        merge.run([home / "a", home / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_old_damaged_missing_and_too_few(home, tmp_path):
    shutil.copytree(home / "b", tmp_path / "old")
    record, _ = Calibration.load(tmp_path / "old" / CALIBRATION)
    info, tensors = as_of(4, record)
    write_tensors(tmp_path / "old" / CALIBRATION, tensors, {"info": info, "extra": None})
    with pytest.raises(InputError, match="version 4 cannot be merged, expected 5"):
        merge.run([home / "a", tmp_path / "old"], tmp_path / "out")
    (tmp_path / "old" / CALIBRATION).write_bytes(b"x" * 100)
    with pytest.raises(CorruptFile, match="not a readable safetensors file"):
        merge.run([home / "a", tmp_path / "old"], tmp_path / "out")
    for sources in ([home / "a", tmp_path / "none"], [home / "a", home / "model"]):
        with pytest.raises(InputError, match=r"not found|no run there"):
            merge.run(sources, tmp_path / "out")
    with pytest.raises(InputError, match="1 run is given"):
        merge.run([home / "a"], tmp_path / "out")
    with pytest.raises(InputError, match="is one of the runs to merge"):
        merge.run([home / "a", home / "b"], home / "b")


def test_measuring_needs_to_know_in_which_text(home, tmp_path):
    """A merged run has several; what follows one of them is held out of it by as much as all of them have."""
    merged(home, "ab", tmp_path / "ab")
    info = Calibration.load(tmp_path / "ab" / CALIBRATION)[0].info
    assert info.texts == sorted(str(home / "text" / name / "text.jsonl") for name in "ab")
    model = str(home / "model")
    with pytest.raises(InputError, match="merged from calibrations of 2 texts"):
        Subject(info, MeasureSettings(model=model)).sequences()
    shutil.copy(home / "text" / "whole" / "text.jsonl", info.texts[0])
    found = Subject(info, MeasureSettings(model=model, data=info.texts[0], samples=2)).sequences()
    assert found.tolist() == ROWS[6:8].tolist()
