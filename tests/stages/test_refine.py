"""The stage and command `refine`: what it writes, what it refuses, and that kill -9 costs a step."""

import hashlib
import json
import re
import signal

import numpy as np
import pytest
import torch

from kvcalib.artifact import store
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.model.loading import load_model
from kvcalib.runtime.loader import load
from kvcalib.stages import build, refine
from kvcalib.stages.refine import RefineSettings
from kvcalib.stages.report import find as find_report
from kvcalib.stages.report import gather
from tests.crash.road import tree
from tests.crash.stem import Stem
from tests.test_cli import VOCABULARY, ok, refused, save
from tests.tiny import make_artifact, make_run, tiny_llama

TRAINED, HELD_OUT, LENGTH = 12, 4, 24
SETTINGS = {
    "samples": TRAINED, "held_out": HELD_OUT, "seq_len": LENGTH, "steps": 4, "every": 2, "batch_size": 4, "lr": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, an artifact for it, and text."""
    home = tmp_path_factory.mktemp("refine")
    model = tiny_llama(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48)
    save(model, home / "model")
    make_artifact(home, model, key_bits=2, value_bits=2, format="int")  # levels that were not fitted
    write_text(home / "data.jsonl", np.random.default_rng(0).integers(3, VOCABULARY, (TRAINED + HELD_OUT, LENGTH)))
    return home


def write_text(path, rows):
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in np.asarray(rows).tolist()))


def settings(home, **changed):
    return RefineSettings(**({"data": str(home / "data.jsonl")} | SETTINGS | changed))


def options(home, **changed):
    """The same on the command line."""
    chosen = {"model": home / "model", "data": home / "data.jsonl"} | SETTINGS | changed
    return [part for name, value in chosen.items() for part in ("--" + name.replace("_", "-"), value)]


def refined(home, out, **changed):
    return refine.run(home / "artifact", out, settings(home, **changed), str(home / "model"))


@pytest.fixture(scope="module")
def better(home):
    out = home / "better"
    refined(home, out)
    return out


def test_no_steps_give_todays_bytes(home, tmp_path):
    exported = tmp_path / "exported"
    store.install(exported, store.contents(home / "artifact")[1])
    (exported / "exports").mkdir()
    (exported / "exports" / "kv_cache_scales.json").write_text("{}")
    for source, out in ((home / "artifact", tmp_path / "a"), (exported, tmp_path / "b")):
        manifest = refine.run(source, out, settings(home, steps=0), "there-is-no-such-model")
        assert manifest.refined is None
        assert b'"refined"' not in (out / "manifest.json").read_bytes()
        written = {name: content for name, content in tree(source).items() if name != "exports/kv_cache_scales.json"}
        assert {name: content for name, content in tree(out).items() if name in written} == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "exported"]


def test_it_is_better_where_it_says_so(home, better):
    record = load(better).manifest.refined
    rows = np.array([json.loads(line)["input_ids"] for line in (home / "data.jsonl").read_text().splitlines()])
    training, held_out = rows[:TRAINED], rows[TRAINED:]
    model = load_model(str(home / "model"), "float32", "cpu", None, False)
    before, after = evaluate(model, [load(home / "artifact"), load(better)], held_out, batch_size=4)
    assert (record.kld_before, record.kld_after) == pytest.approx((before.kld, after.kld), rel=1e-4)
    assert record.kld_after < record.kld_before
    assert record.steps in (2, 4)
    assert (record.lr, record.seed, record.data) == (0.1, 0, str(home / "data.jsonl"))
    assert record.fingerprint == hashlib.sha256(training.astype("<i8").tobytes()).hexdigest()
    assert record.held_out_fingerprint == hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()
    assert not (home / "better.refine").exists()


def test_only_codebooks_change(home, better):
    (old, was), (new, now) = (store.read(home / name) for name in ("artifact", "better"))
    assert set(was) == set(now)
    for name, tensor in was.items():
        assert torch.equal(tensor, now[name]) != name.endswith("codebook"), name
    assert (old.layers, old.fit, old.calibration, old.runtime) == (new.layers, new.fit, new.calibration, new.runtime)


def test_everybody_says_so(home, better):
    record = load(better).manifest.refined
    line = f"held-out KLD {record.kld_before:.6f} before, {record.kld_after:.6f} after"
    assert f"| refined | {record.steps} steps on data.jsonl, {line}" in (better / "README.md").read_text()
    assert line in " ".join(ok("inspect", better).output.split())
    assert line in gather(find_report(better)).provenance["Artifact"]["refined"]
    assert "refined" not in (home / "artifact" / "README.md").read_text()
    assert "refined" not in ok("inspect", home / "artifact").output
    assert "refined" not in gather(find_report(home / "artifact")).provenance["Artifact"]


def test_the_same_command_again_changes_nothing(home, better):
    before = tree(better)
    out = ok("refine", home / "artifact", "--out", better, *options(home)).output
    assert tree(better) == before
    assert re.search(r"held-out KLD [.\d]+ before, [.\d]+ after \(-[.\d]+%\)", " ".join(out.split()))


def test_a_rate_too_hot_is_refused(home, tmp_path):
    message = refused(
        2, r"the held-out KLD is .* nats per token at best, .* before: not lower, so .*out was not written; try a "
        r"smaller --lr than 10000", "refine", home / "artifact", "--out", tmp_path / "out", *options(home, lr=1e4),
    )  # fmt: skip
    assert "held-out" in message
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_is_never_trained_on(home, tmp_path):
    """A sequence that holds a piece of it (here 12 tokens are all there are in common) is left out."""
    rows = np.random.default_rng(1).integers(3, VOCABULARY, (6, 2 * refine.SHARED))
    rows[1, 5 : 5 + refine.SHARED] = rows[5, 20 : 20 + refine.SHARED]
    rows[2, 5 : 4 + refine.SHARED] = rows[5, 20 : 19 + refine.SHARED]  # one less is no piece
    write_text(tmp_path / "text.jsonl", rows)
    chosen = settings(home, data=str(tmp_path / "text.jsonl"), seq_len=2 * refine.SHARED, samples=4, held_out=2)
    text = refine._text(str(home / "model"), chosen)
    assert text.training.tolist() == rows[[0, 2, 3]].tolist()
    assert text.held_out.tolist() == rows[4:].tolist()


def test_killed_at_any_step_it_goes_on(home, tmp_path):
    stem, work = Stem(), tmp_path / "work"
    command = ("refine", home / "artifact", "--out", work / "out", *options(home))
    try:
        work.mkdir()
        stem.warm("refine", home / "artifact", "--out", tmp_path / "warm", *options(home))
        quiet = stem.ok(*command, work=work)
        expected = tree(work)
        assert sorted(p.name for p in work.iterdir()) == ["out"]
        steps = [n for n, (_, what) in enumerate(quiet.operations, 1) if what.endswith("refine/state.safetensors")]
        assert len(steps) == 5, "one at the start and one after every step"
        installed = next(n for n, (_, what) in enumerate(quiet.operations, 1) if what == "os.rename out")
        # Before the third step is kept; installed, and the state half removed.
        for number in (steps[3], installed + 2, quiet.done):
            for path in work.iterdir():
                (work / path.name).rename(tmp_path / f"{number}-{path.name}")
            ended = stem.run(*command, work=work, die=number)
            assert ended.code == -signal.SIGKILL
            if number == steps[3]:
                other = stem.run("refine", *command[1:4], *options(home, lr=0.05))
                assert other.code == 4
                assert "refine was started with lr=0.1, now 0.05" in other.err
            again = stem.ok(*command, work=work)
            assert tree(work) == expected, quiet.operations[number - 1]
            if number < installed:
                assert "refine: 2 of 4 steps are done" in again.err
                assert again.passes < quiet.passes
    finally:
        stem.close()


def test_an_unfinished_one_can_be_thrown_away(home, tmp_path):
    state = refine.RunDir(tmp_path / "out.refine", create=True)
    state.parts("refine", {"lr": 9})
    refused(
        4, r"out\.refine: holds an unfinished run: refine was started with",
        "refine", home / "artifact", "--out", tmp_path / "out", *options(home),
    )  # fmt: skip
    ok("refine", home / "artifact", "--out", tmp_path / "out", *options(home), "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_artifact_is_kept(home, better, tmp_path):
    out = tmp_path / "out"
    store.install(out, store.contents(better)[1])
    before = tree(out)
    refused(4, "out: holds another artifact", "refine", home / "artifact", "--out", out, *options(home, lr=0.05))
    assert tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no model was run for it"


def test_bad_input(home, tmp_path):
    artifact, out = home / "artifact", ("--out", tmp_path / "out")
    refused(2, "nowhere", "refine", home / "nowhere", *out, *options(home))
    refused(2, "the artifact that is to be refined", "refine", artifact, "--out", artifact, *options(home))
    refused(2, r"--lr is 0\.0", "refine", artifact, *out, *options(home, lr=0))
    refused(2, r"--lr is nan", "refine", artifact, *out, *options(home, lr="nan"))
    refused(2, "of which 16 are held out and none is left", "refine", artifact, *out, *options(home, held_out=16))
    refused(2, "no such file", "refine", artifact, *out, *options(home, data=home / "nothing.jsonl"))
    write_text(tmp_path / "same.jsonl", np.ones((6, LENGTH), int) * 5)
    refused(
        2, "every sequence to train on holds 24 tokens of the held-out text",
        "refine", artifact, *out, *options(home, data=tmp_path / "same.jsonl", samples=2),
    )  # fmt: skip
    write_text(tmp_path / "large.jsonl", np.arange(6 * LENGTH).reshape(6, LENGTH) + VOCABULARY)
    refused(2, "token id", "refine", artifact, *out, *options(home, data=tmp_path / "large.jsonl", samples=2))
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(home, tmp_path):
    other = save(tiny_llama(5, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48), tmp_path / "other")
    refused(
        3, "was built for .* this model's weights", "refine", home / "artifact", "--out", tmp_path / "out",
        *options(home, model=other),
    )  # fmt: skip


def test_a_window_longer_than_the_text_is_refused(home, tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48)
    build.run(make_run(tmp_path / "run", model, key_bits=2, value_bits=2), tmp_path / "a", recent=LENGTH)
    refused(
        2, "the last 24 tokens exact, so nothing of a sequence would be quantized",
        "refine", tmp_path / "a", "--out", tmp_path / "out", *options(home),
    )  # fmt: skip
