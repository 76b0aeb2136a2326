"""Calibration files, records of stages and adaptive widths that lie."""

from __future__ import annotations

import json
import os

import pytest
import torch

from kvcalib.calibration.merging import Merger
from kvcalib.calibration.statistics import Calibration, CalibrationInfo
from kvcalib.calibration.validate import ALL, SUMS, UNTIL_7
from kvcalib.errors import KvcalibError
from kvcalib.files import read_json, read_tensors, write_json, write_tensors
from kvcalib.rundir import CALIBRATION, RunDir
from tests.hostile.builders import put
from tests.tiny import as_of, calibrate, tiny_llama

HUGE = 10**18
SAMPLE = "layers.0.sample.key"


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Tensors and metadata of a calibration of the tiny model."""
    path = tmp_path_factory.mktemp("run") / CALIBRATION
    calibrate(tiny_llama(), samples=2, seq_len=24, keep=20).save(path)
    return read_tensors(path)


def refused(path, message: str) -> None:
    with pytest.raises(KvcalibError, match=message) as caught:
        # Numbers are looked at when they are read.
        dict(Calibration.load(path)[0].tensors)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_the_truth_loads_and_merges(truth, tmp_path):
    write_tensors(tmp_path / "c", *truth)
    record, _ = Calibration.load(tmp_path / "c")
    assert set(record.stored) == set(truth[0])
    assert all(record.tensors[name].ndim < 4 for name in record.tensors)
    other = calibrate(tiny_llama(), samples=3, seq_len=24, keep=20)
    assert other.info.sequences == 3
    with pytest.raises(KvcalibError, match="would count twice"):
        Merger.of([tmp_path / "c", tmp_path / "c"])


LAYER = ("info", "layers", 0)
NOTES = {
    "another version": (put("info", "version", 99), "calibration version is 99"),
    "a version as text": (put("info", "version", "4"), "calibration version is '4'"),
    "a version as a float": (put("info", "version", 4.0), r"calibration version is 4\.0"),
    "no info": (lambda n: n.pop("info"), "calibration version is None"),
    "info as a list": (put("info", []), "calibration version is None"),
    "an unknown field": (put("info", "colour", 1), r"info\.colour"),
    "a field less": (lambda n: n["info"].pop("seed"), r"info\.seed"),
    "no layers field": (lambda n: n["info"].pop("layers"), r"info\.layers"),
    "10^18 sequences": (put("info", "sequences", HUGE), r"info\.sequences"),
    "-1 tokens": (put("info", "tokens", -1), r"info\.tokens is -1"),
    "a loss of NaN": (put("info", "nll_sum", float("nan")), r"info\.nll_sum is nan"),
    "an infinite loss": (put("info", "nll_sum", float("inf")), r"info\.nll_sum is inf"),
    "10^18 heads": (put(*LAYER, "kv_heads", HUGE), r"info\.layers\[0\]\.kv_heads"),
    "2^40 query heads": (put(*LAYER, "query_heads", 1 << 40), r"info\.layers\[0\]\.head_dim is 16, expected 1\.\.0"),
    "heads that do not divide": (
        put(*LAYER, "query_heads", 5),
        r"layers\[0\]\.kv_heads is 2, expected a divisor",
    ),
    "no kv heads": (put(*LAYER, "kv_heads", 0), r"info\.layers\[0\]\.kv_heads is 0"),
    "other channels": (put(*LAYER, "head_dim", 8), r"info\.layers\[0\]\.partner"),
    "a partner out of range": (put(*LAYER, "partner", 3, HUGE), r"info\.layers\[0\]\.partner"),
    "a partner below 0": (put(*LAYER, "partner", 0, -8), r"info\.layers\[0\]\.partner"),
    "a partner of another": (put(*LAYER, "partner", 0, 9), r"info\.layers\[0\]\.partner"),
    "a layer beyond the model": (put("info", "layers", 1, "index", 2), r"info\.layers\[1\]\.index is 2"),
    "a layer twice": (put("info", "layers", 1, "index", 0), r"info\.layers\[1\]\.index is 0"),
    "a layer less": (lambda n: n["info"]["layers"].pop(), r"tensor 'layers\.1\..*' is none that"),
    "a sequence more": (put("info", "sequences", 3), r"sequences is int64 \[2\], expected int64 \[3\]"),
    "fewer tokens kept than there are": (put("info", "keep_tokens", 3), "expected as the others and at most 3"),
    "shorter sequences": (put("info", "seq_len", 2), r"sample\.position spans \d+\.\.\d+, expected 0\.\.1"),
    "a hash that is none": (put("info", "model", "weights_sha256", "x"), r"info\.model\.weights_sha256"),
}


@pytest.mark.parametrize("name", NOTES)
def test_metadata_that_lies(truth, tmp_path, name):
    tensors, note = truth
    change, message = NOTES[name]
    note = json.loads(json.dumps(note))
    change(note)
    write_tensors(tmp_path / "c", tensors, note)
    refused(tmp_path / "c", message)


def poison(name: str, value: float):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


def poison_all(name: str, value: int):
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


def with_shape(name: str, part):
    return lambda tensors: tensors.update({name: tensors[name][part].contiguous()})


TENSORS = {
    "keys of NaN": (poison(SAMPLE, torch.nan), r"layers\.0\.sample\.key holds NaN or infinity"),
    "infinite sums": (poison("layers.1.value.sum.top", 32767), r"layers\.1\.value\.sum\.top leaves -27\.\.25"),
    "gradients of NaN": (poison("layers.0.sample.key_gradient", torch.nan), r"sample\.key_gradient holds NaN"),
    "a Fisher beyond float32": (
        poison("layers.0.sample.key_gradient", 1e30),
        r"sample\.key_fisher holds NaN or infinity",
    ),
    "squares below 0": (
        poison_all("layers.0.key.square_sum.limbs", -1),
        r"key\.square_sum holds numbers below 0",
    ),
    "counts below 0": (poison("layers.0.query.norm_histogram", -1), r"query\.norm_histogram holds numbers below 0"),
    "attention of NaN": (poison("layers.0.sample.attention_early", torch.nan), "attention_early holds NaN"),
    "a position of 10^18": (poison("sample.position", HUGE), r"sample\.position spans \d+\.\.1000000000000000000"),
    "a position below 0": (poison("sample.position", -1), r"sample\.position spans -1"),
    "fewer tokens": (
        with_shape(SAMPLE, slice(0, 5)),
        r"sample\.key is float32 \[5, 2, 16\], expected .*\[20, 2",
    ),
    "fewer heads": (with_shape("layers.0.key.sum.top", slice(0, 1)), r"key\.sum\.top is int16 \[1, 16\], expected"),
    "a dimension less": (with_shape("layers.0.query.outer.limbs", 0), r"query\.outer\.limbs is int64 \[2, 16, 16\]"),
    "fewer positions": (with_shape("sample.position", slice(0, 5)), r"sample\.position has 5 tokens"),
    "sums as they were": (
        lambda t: t.update({"layers.0.key.sum": torch.ones(2, 16).double()}),
        r"key\.sum\.limbs' is none that",
    ),
    "keys as integers": (lambda t: t.update({SAMPLE: t[SAMPLE].long()}), r"layers\.0\.sample\.key is int64"),
    "hashes as floats": (lambda t: t.update({"sample.hash": t["sample.hash"].double()}), r"sample\.hash is float64"),
    "no hashes": (lambda t: t.pop("sample.hash"), r"sample\.hash is missing"),
    "no tensors": (lambda t: t.clear(), r"sample\.hash is missing"),
    "a tensor of no layer": (lambda t: t.update({"layers.9.key.sum": torch.ones(2, 16)}), "is none that"),
    "a name with a path": (lambda t: t.update({"../../x": torch.ones(2)}), r"'\.\./\.\./x' is none that"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie(truth, tmp_path, name):
    change, message = TENSORS[name]
    tensors = dict(truth[0])
    change(tensors)
    write_tensors(tmp_path / "c", tensors, truth[1])
    refused(tmp_path / "c", message)


@pytest.mark.parametrize("name", list(ALL))
def test_every_tensor_is_asked_for(truth, tmp_path, name):
    stored = [f"{name}.limbs", f"{name}.top"] if ALL[name][0] is SUMS else [name]
    tensors, note = truth
    if name in UNTIL_7:
        info, tensors = as_of(6, Calibration(CalibrationInfo.model_validate(note["info"]), tensors))
        note = note | {"info": info}
    tensors = {n: t for n, t in tensors.items() if n != f"layers.1.{stored[-1]}"}
    write_tensors(tmp_path / "c", tensors, note)
    refused(tmp_path / "c", rf"layers\.1\.{stored[-1]} is missing")


# Records of stages


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run", create=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "."])
def test_record_that_names_a_file_elsewhere(run, tmp_path, name):
    (tmp_path / "secret").write_text("mine")
    write_json(run.path / "stages" / "fisher.json", {"settings": {}, "outputs": {name: "0" * 64}})
    with pytest.raises(KvcalibError, match="outputs names"):
        run.up_to_date("fisher", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"settings": {}, "settings": {"a": 1}, "outputs": {}}', "'settings' is given twice"),
        (b'{"settings": {"a": NaN}, "outputs": {}}', "NaN"),
        (b'\xef\xbb\xbf{"settings": {}, "outputs": {}}', "BOM"),
        ('{"settings": {}, "outputs": {}}'.encode("utf-16"), "not valid JSON"),
        (b'{"settings": [], "outputs": {}}', "field 'settings'"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"settings": {"a": 1e999}, "outputs": {}}', "beyond what a float"),
        (b" " * (17 << 20), "expected at most"),
    ],
    ids=["twice", "nan", "bom", "utf-16", "list", "deep", "overflow", "long"],
)
def test_record_that_is_none(run, text, message):
    (run.path / "stages").mkdir()
    (run.path / "stages" / "fisher.json").write_bytes(text)
    with pytest.raises(KvcalibError, match=message):
        run.record("fisher")


def test_something_else_in_a_files_place(run, tmp_path):
    """A FIFO hangs who opens it; a device can do anything."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "fifo", tmp_path / "loop", "/dev/zero", tmp_path):
        place = run.file(CALIBRATION)
        place.unlink(missing_ok=True)
        place.symlink_to(path)
        for read in (Calibration.load, read_json):
            with pytest.raises(KvcalibError, match=CALIBRATION.replace(".", r"\.")):
                read(place)


def test_run_marker_that_is_another_programs(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": "x" * 100_000}))
    with pytest.raises(KvcalibError, match="expected") as caught:
        RunDir(tmp_path)
    assert len(str(caught.value)) < 500
