"""`kvcalib report` as a user meets it."""

import json

import pytest

from kvcalib.runtime.loader import load
from kvcalib.stages import build
from tests.stages.test_report import comparison
from tests.test_cli import ok, refused
from tests.tiny import make_run, tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("report")
    model = tiny_llama()
    model.save_pretrained(home / "model")
    build.run(make_run(home / "run", model), home / "nuq2", 2, 2)
    (home / "compared.json").write_text(comparison().model_dump_json())
    return home


def test_a_run_an_artifact_and_a_comparison(home):
    assert ok("report", home / "run").stdout == f"report: {home / 'run.html'}\n"
    out = home / "shown" / "page.html"
    given = ("--comparison", home / "compared.json", "--model", home / "model", "--out", out)
    assert ok("report", home / "nuq2", *given).stdout == f"report: {out}\n"
    text = out.read_text()
    assert "kivi:bits=2" in text
    assert "2026-11-23T04:00:00Z" in text
    assert load(home / "nuq2").manifest.calibration.fingerprint in text


def test_what_is_wrong_has_one_message_and_an_exit_code(home, tmp_path):
    refused(2, "no such folder", "report", tmp_path / "none")
    refused(2, "neither a run", "report", tmp_path)
    refused(2, "is a folder", "report", home / "run", "--out", tmp_path)
    refused(2, "not found", "report", home / "run", "--comparison", tmp_path / "none.json")
    (tmp_path / "c.json").write_text(json.dumps({"format": "other"}))
    refused(2, "field 'format'", "report", home / "run", "--comparison", tmp_path / "c.json")
    refused(2, "not found", "report", home / "run", "--sweep", tmp_path / "none.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
