"""Adaptive widths from run to folder to eval, and what is refused on the way."""

import json
import shutil

import pytest
import torch

import kvcalib
from kvcalib.allocation.tiers import NEVER
from kvcalib.errors import ArtifactMismatch, CorruptFile, FolderInUse, InputError
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.runtime.tiers import Adaptive
from kvcalib.stages import build, tiers
from tests.tiny import make_run, tiny_llama, tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its run, artifacts of 1, 2 and 4 bits, and adaptive widths of them."""
    folder = tmp_path_factory.mktemp("tiers")
    model = tiny_llama()
    run = make_run(folder / "run", model, outliers=0.03)
    paths = [folder / f"bits{b}" for b in (1, 2, 4)]
    for b, path in zip((1, 2, 4), paths, strict=True):
        build.run(run, path, b, b)
    rule = tiers.run(run, paths[::-1], folder / "adaptive", tiers.TierSettings(budget=3.5))
    return model, run, paths, folder / "adaptive", rule


def test_the_budget_counts_rows_tags_and_positions(made):
    """Tiers of the calibration's own tokens, drawn by hand, take the bits that the rule says."""
    _, run, paths, _, rule = made
    from kvcalib.calibration.statistics import Calibration
    from kvcalib.rundir import CALIBRATION

    record, _ = Calibration.load(run.file(CALIBRATION))
    whole = record.tensors["sample.position"] + record.info.window <= record.info.seq_len
    total = 32.0 + 2 * 8
    for limits in rule.layers:
        signal = record.layer(limits.index)["sample.attention_late"][whole].mean(1)
        assert limits.mean == pytest.approx(float(signal.mean()))
        for role in ("key", "value"):
            size = [8 * row_bytes(kvcalib.load(path).quantizers[limits.index][role]) for path in paths]
            chosen = [sum(s >= limit for limit in getattr(limits, role)) for s in signal]
            total += sum(size[c] for c in chosen) / len(chosen)
    assert rule.bits == pytest.approx(total / (2 * 2 * 2 * 16))
    assert 3.4 < rule.bits <= 3.5


def row_bytes(quantizer):
    return 4 * quantizer.layout.words + 3 * quantizer.outliers + (4 if quantizer.relative else 0)


@pytest.mark.parametrize("tier", [0, 2])
@pytest.mark.parametrize("step", [1, 6])
def test_one_tier_for_all_is_that_artifact(made, tier, step):
    """Thresholds that leave only one tier give the figures of its artifact in the same steps."""
    model, _, paths, folder, _ = made
    loaded = kvcalib.load_adaptive(folder)
    limits = [0.0] * tier + [NEVER] * (2 - tier)
    layers = [x.model_copy(update={"key": limits, "value": limits}) for x in loaded.rule.layers]
    one = Adaptive(loaded.rule.model_copy(update={"layers": layers}), loaded.tiers)
    ids = tokens(4, 40, 5).numpy()
    fixed, adaptive = evaluate(model, [kvcalib.load(paths[tier])], ids, batch_size=2, step=step, adaptive=one)
    assert fixed.recent == adaptive.recent == 5 + step - 1
    assert adaptive.nll == pytest.approx(fixed.nll, abs=1e-5)
    assert adaptive.kld == pytest.approx(fixed.kld, rel=1e-3)
    assert fixed.kld > 1e-3
    assert (adaptive.step, adaptive.adaptive, fixed.adaptive) == (step, "adaptive", None)
    assert f"{step} tokens a pass" in adaptive.protocol


def test_folders_are_checked(made, tmp_path):
    folder = made[3]
    with pytest.raises(InputError, match="no adaptive widths there"):
        kvcalib.load_adaptive(tmp_path)
    for name, damage, message in (
        ("adaptive.json", lambda p: p.write_text(p.read_text().replace('"window": 5', '"window": 6')), "digest"),
        (
            "adaptive.json",
            lambda p: p.write_text(p.read_text().replace('"bits": 3', '"bits": NaN, "x": 3')),
            "NaN is no number",
        ),
        ("adaptive.json", lambda p: p.write_text("{"), "not the JSON"),
        ("adaptive.json", lambda p: p.write_text("[]"), "not the JSON"),
        ("adaptive.json", lambda p: p.write_text(json.dumps({"format": "x"})), "format is 'x'"),
        ("tier-1", shutil.rmtree, "missing"),
        ("tier-1", lambda p: (shutil.rmtree(p), shutil.copytree(folder / "tier-0", p)), "another artifact"),
        ("tier-1/tensors.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "sha256|damaged"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damage(copy / name)
        with pytest.raises(CorruptFile, match=message):
            kvcalib.load_adaptive(copy)
        shutil.rmtree(copy)


def test_what_is_refused(made, tmp_path):
    _, run, paths, folder, rule = made
    settings = tiers.TierSettings(budget=3.5)
    with pytest.raises(InputError, match="1 artifacts are given, expected 2 to 15"):
        tiers.run(run, paths[:1], tmp_path / "out", settings)
    with pytest.raises(InputError, match=r"budget is 40 effective bits, these artifacts take 2.625 to 5.625"):
        tiers.run(run, paths, tmp_path / "out", tiers.TierSettings(budget=40))
    other = tiny_llama(num_hidden_layers=3)
    mine = make_run(tmp_path / "run", other)
    build.run(mine, tmp_path / "other", 2, 2)
    with pytest.raises(InputError, match="quantizes other layers"):
        tiers.run(run, [paths[0], tmp_path / "other"], tmp_path / "out", settings)
    turned = make_run(tmp_path / "turned", tiny_llama(), outliers=0.03, value_basis="pca")
    build.run(turned, tmp_path / "axes", 3, 3)
    with pytest.raises(InputError, match=r"values of layer 0 are kept in another basis in .*axes than in .*bits1"):
        tiers.run(run, [paths[0], tmp_path / "axes"], tmp_path / "out", settings)
    mixed = Adaptive(rule, tuple(kvcalib.load(p).quantizers for p in (paths[0], tmp_path / "axes")))
    with pytest.raises(ArtifactMismatch, match=r"tier 1, layer 0: values are kept in another basis than in tier 0"):
        mixed.check_fit(kvcalib.load(paths[0]).quantizers)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    with pytest.raises(FolderInUse, match="no adaptive widths"):
        tiers.run(run, paths, tmp_path / "taken", settings)
    with pytest.raises(FolderInUse, match="--overwrite"):
        tiers.run(run, paths[1:], folder, tiers.TierSettings(budget=4.0))
    assert tiers.run(run, paths, folder, settings).encode() == rule.encode() == (folder / "adaptive.json").read_bytes()
    with pytest.raises(ArtifactMismatch, match=r"tier 0 quantizes layers \[0, 1\], the artifact \[0, 1, 2\]"):
        kvcalib.attach(other, tmp_path / "other", adaptive=folder)
    with pytest.raises(ValueError, match="keep_exact is 'disk'"):
        kvcalib.load_adaptive(folder, "disk")


def test_the_command_line(made, tmp_path, capsys):
    from typer.testing import CliRunner

    from kvcalib.cli import app

    _, run, paths, _, _ = made
    runner = CliRunner()
    arguments = ["tiers", str(run.path), *map(str, paths), "--budget", "3.5"]
    done = runner.invoke(app, [*arguments, "--out", str(tmp_path / "new")])
    assert done.exit_code == 0
    assert "3 tiers" in done.stdout
    assert torch.isfinite(torch.tensor(kvcalib.load_adaptive(tmp_path / "new").rule.bits))
    done = runner.invoke(app, [*arguments, "--signal", "loud", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    done = runner.invoke(app, ["eval", str(paths[0]), "--keep-exact", "cpu"])
    assert done.exit_code == 2
