"""Cards with a comparison's figures, and what `push` and `pull` refuse before they ask anybody."""

import json
import shutil

import pytest

import kvcalib
from kvcalib.artifact import store
from kvcalib.artifact.card import card
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.evaluation.comparison import Comparison, Interval, Row
from kvcalib.stages import build, sharing
from tests.artifact.test_store import contents, write
from tests.tiny import make_run, tiny_llama


def row(name: str, **changed) -> Row:
    figures = dict.fromkeys(("delta_nll", "kld"), Interval(value=0.01234, low=0.011, high=0.0135))
    return Row(
        name=name, source="", settings={}, effective_bits=2.51, cache_bytes=3 << 20, fp16_cache_bytes=16 << 20,
        ppl=9.8765, nll=2.29, kld_p99=0.25, top1_agreement=Interval(value=0.951, low=0.94, high=0.96),
        **figures | changed,
    )  # fmt: skip


def comparison(model: str = "tiny", *rows: Row) -> Comparison:
    return Comparison(
        model=model, dtype="float32", data="text.jsonl", samples=8, seq_len=512, fp16_nll=2.2789, protocol="One pass.",
        created="2026-11-23T04:00:00Z", machine="2 cores", versions={},
        rows=list(rows or (row("fp16"), row("artifact"))),
    )  # fmt: skip


@pytest.fixture
def artifact(tmp_path):
    return write(tmp_path / "artifact")


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(comparison().model_dump_json())
    return path


def test_a_built_artifacts_card(tmp_path):
    run = make_run(tmp_path / "run", tiny_llama())
    manifest = build.run(run, tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == card(manifest)
    build.run(run, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_refreshed_card(artifact, measured):
    (artifact / "exports").mkdir()
    (artifact / "exports/cache_config.json").write_text("{}\n")
    before = contents(artifact)
    sharing.refresh_card(artifact, measured, "mit")
    after = contents(artifact)
    assert {name for name in after if after[name] != before[name]} == {"README.md", "manifest.json"}
    old, new = (json.loads(c["manifest.json"]) for c in (before, after))
    assert old["files"].pop("README.md") != new["files"].pop("README.md")
    assert old.pop("digest") != new.pop("digest")
    assert old == new
    kvcalib.load(artifact)
    text = after["README.md"].decode()
    assert "license: mit" in text
    assert "One pass. 8 sequences of 512 tokens of text.jsonl, float32, 2 cores, 2026-11-23." in text
    cells = "2.51 | 3.00 | 9.877 | +0.0123 (+0.0110 to +0.0135) | 0.0123 (0.0110 to 0.0135) | 0.250"
    assert f"| fp16 | {cells} | 95.10 (94.00 to 96.00) |" in text
    assert "| **artifact** | **2.51** |" in text
    sharing.refresh_card(artifact, measured, "mit")
    assert contents(artifact) == after
    sharing.refresh_card(artifact)
    assert "No comparison was attached" in (artifact / "README.md").read_text()


def test_failed_contenders_say_why(artifact, tmp_path):
    failed = row("quanto", failed="no package")
    (tmp_path / "c.json").write_text(comparison("a/tiny", failed).model_dump_json())
    sharing.refresh_card(artifact, tmp_path / "c.json")
    assert "| quanto | failed: no package | | | | | | |" in " ".join((artifact / "README.md").read_text().split("  "))


def test_what_is_no_comparison_is_refused(artifact, tmp_path):
    before = contents(artifact)
    with pytest.raises(InputError, match=r"no such file.*--compare"):
        sharing.refresh_card(artifact, tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"model": "tiny"}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(CorruptFile, match=r"is no comparison of kvcalib.*--compare"):
            sharing.refresh_card(artifact, tmp_path / "c.json")
    (tmp_path / "c.json").write_text(comparison("someone/other").model_dump_json())
    with pytest.raises(InputError, match=r"'someone/other'.*'tiny'"):
        sharing.refresh_card(artifact, tmp_path / "c.json")
    assert contents(artifact) == before


def test_refused_before_the_hub_is_asked(artifact, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        sharing.push(tmp_path / "none", "a/b")
    with pytest.raises(InputError, match="owner/name"):
        sharing.push(artifact, "name")
    (artifact / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile):
        sharing.push(artifact, "a/b")
    with pytest.raises(InputError, match="owner/name"):
        sharing.pull("name")


def test_exports_do_not_stop_an_overwrite_but_other_files_do(artifact, tmp_path):
    (artifact / "exports").mkdir()
    (artifact / "exports/cache_config.json").write_text("{}\n")
    shutil.copytree(artifact, tmp_path / "copy")
    write(artifact)  # the same artifact: nothing to do, its exports stay
    assert (artifact / "exports/cache_config.json").is_file()
    write(artifact, seed=1, overwrite=True)  # another one: the exports were of the old one
    assert set(contents(artifact)) == {"manifest.json", "tensors.safetensors", "README.md"}
    (tmp_path / "copy/exports/mine.txt").write_text("")
    with pytest.raises(FolderInUse, match="exports"):
        write(tmp_path / "copy", seed=1, overwrite=True)
    assert set(store.contents(tmp_path / "copy")[1]) == {
        "manifest.json", "tensors.safetensors", "README.md", "exports/cache_config.json",
    }  # fmt: skip
