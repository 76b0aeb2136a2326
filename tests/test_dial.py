"""The one dial, `--bits`: what is asked for is what a long cache has, on the command line of every stage."""

import json

import pytest
import torch

import kvcalib
from kvcalib.artifact import store
from kvcalib.model.loading import load_model
from kvcalib.stages import dial
from kvcalib.stages.fit_nuq import FitNuqSettings
from tests.test_cli import ok, refused, snapshot
from tests.tiny import tiny_llama

SMALL = ("--samples", 2, "--seq-len", 64)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of the embedded model at the default budget."""
    folder = tmp_path_factory.mktemp("dial")
    shown = ok("run", "builtin", "--out", folder / "default", *SMALL).stdout
    (folder / "shown").write_text(shown)
    return folder


def test_a_run_ends_with_its_report(home):
    path = home / "default.html"
    assert f"report: {path}" in (home / "shown").read_text()
    assert 'id="pareto"' in path.read_text()


@pytest.fixture(scope="module")
def model():
    return load_model("builtin")


def held(model, artifact, tokens):
    """Bits per element of everything that a cache of `tokens` tokens holds, counted tensor by tensor."""
    kvcalib.attach(model, artifact)
    cache = kvcalib.load(artifact).new_cache(model)
    ids = torch.randint(3, 2048, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    kvcalib.detach(model)
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return 8 * sum(t.numel() * t.element_size() for t in cache.tensors().values()) / elements


def test_the_default_is_two_and_a_half(home, model):
    manifest = store.read_manifest(home / "default")
    assert manifest.budget.asked == 2.5
    assert 2.5 * 0.97 <= held(model, home / "default", 400) <= 2.5
    assert "2.50" in (home / "shown").read_text()
    measured = json.loads((home / "default.run" / "eval.json").read_text())
    assert measured["budget"] == 2.5
    assert measured["effective_bits"] <= 2.5
    assert measured["long_cache_bits"] == pytest.approx(held(model, home / "default", 400))


# 128 sampled tokens are what 7 bits tell apart: wider codes save nothing here, and no plan spends bits on them.
@pytest.mark.parametrize("budget", [1.75, 2.0, 2.31, 2.9, 3.33, 4.0, 5.05, 6.5])
def test_what_is_asked_for_is_what_a_long_cache_has(home, model, tmp_path, budget):
    ok("build", home / "default.run", "--out", tmp_path / "a", "--bits", budget)
    assert store.read_manifest(tmp_path / "a").budget.asked == budget
    found = held(model, tmp_path / "a", 300)
    assert 0.97 * budget <= found <= budget


def test_short_caches_with_sinks_say_so(home, tmp_path):
    ok("build", home / "default.run", "--out", tmp_path / "a", "--bits", 3)
    options = ("--model", "builtin", "--samples", 1, "--seq-len", 32, "--sinks", 4)
    shown = " ".join(ok("eval", tmp_path / "a", *options).stdout.split())
    assert "sinks, a recent window and spare room add to the budget in a cache of only 32 tokens" in shown
    assert "a long one has 2.9" in shown or "a long one has 3.00" in shown
    assert "add to the budget" not in ok("eval", tmp_path / "a", *options[:-2]).stdout


def test_a_budget_keeps_how_widths_were_chosen(home, tmp_path):
    run = home / "default.run"
    ok("allocate", run, "--budget", 3, "--per", "head")
    ok("build", run, "--out", tmp_path / "a", "--bits", 4)
    assert store.read_manifest(tmp_path / "a").budget.asked == 4
    for name, widths in store.read(tmp_path / "a")[1].items():
        if name.endswith("widths"):
            assert bool((widths == widths[:, :1]).all())
    ok("build", run, "--out", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "a")
    ok("allocate", run, "--budget", 3)
    ok("allocate", run, "--widths", 2)
    ok("build", run, "--out", tmp_path / "b")
    assert store.read_manifest(tmp_path / "b").budget is None


def test_fit_nuq_takes_the_budget_too(home, tmp_path):
    assert "effective bits" in ok("fit-nuq", home / "default.run", "--bits", 3.5).stdout
    ok("build", home / "default.run", "--out", tmp_path / "a")
    assert store.read_manifest(tmp_path / "a").budget.asked == 3.5


def test_code_widths_are_no_budget(home, tmp_path):
    ok("build", home / "default.run", "--out", tmp_path / "a", "--key-bits", 2, "--value-bits", 4)
    manifest = store.read_manifest(tmp_path / "a")
    assert (manifest.budget, manifest.mean_bits) == (None, (2, 4))
    assert "budget" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
    out = ("--out", tmp_path / "b")
    ok("run", "builtin", *out, "--key-bits", 2, *SMALL)
    assert store.read_manifest(tmp_path / "b").mean_bits == (2, 3)
    assert not (tmp_path / "b.run" / "allocation.safetensors").exists()


@pytest.mark.parametrize("command", ["run", "build", "fit-nuq"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 3, "--key-bits", 3), r"--bits 3 .*and --key-bits .*exclude each other"),
        (("--bits", 3, "--value-bits", 3), r"--bits 3 .*and --value-bits .*exclude each other"),
        (("--bits", -1), "--bits is -1: expected effective bits above 0"),
        (("--bits", 0), "--bits is 0: expected"),
        (("--bits", "nan"), "--bits is nan: expected"),
        (("--bits", "three"), "--bits.*three"),
        (("--bits", 0.02), r"0\.02.*between 0\.03 effective bits.*and 8\.41|0\.02.*smallest plan has 0\.03"),
        (("--bits", 9), r"is 9\b.*8\.4"),
    ],
)
def test_wrong_budgets(home, tmp_path, command, options, message):
    before = snapshot(home / "default.run") if command == "build" else None
    target = "builtin" if command == "run" else home / "default.run"
    refused(2, message, command, target, *([] if command == "fit-nuq" else ["--out", tmp_path / "a"]), *options)
    assert snapshot(tmp_path) == {}
    assert before in (None, snapshot(home / "default.run"))


def test_the_range_of_budgets_is_that_of_the_caches():
    model = tiny_llama()
    many, only = FitNuqSettings(outliers=0.05), FitNuqSettings(outliers=0.05, choices=None)
    smallest, largest = dial.budget_range([(2, 16)] * 2, only)
    # A token of one layer: 2 of 32 elements exact (2 bytes and an index of 1) in keys and in values; and one position
    # of 4 bytes for both layers. Values as they are have a zero and scale of 4 bytes.
    assert smallest == 8 * (2 * 2 * 2 * 3 + 4) / (2 * 2 * 32)
    as_they_are = only.model_copy(update={"value_basis": "none"})
    assert dial.budget_range([(2, 16)] * 2, as_they_are)[0] == smallest + 8 * 2 * 4 / (2 * 2 * 32)
    assert largest == smallest + 8
    assert dial.budget_range([(2, 16)] * 2, many) == (8 * 4 / (2 * 2 * 32), largest)
    with pytest.raises(kvcalib.errors.InputError, match=r"with 5 % outliers .*without outliers .* takes 0\.25"):
        dial.check_budget(model, 1.0, only)
    with pytest.raises(kvcalib.errors.InputError, match=r"with 0 % or 5 % outliers .*between 0\.25 "):
        dial.check_budget(model, 0.2, many)
    dial.check_budget(model, 1.0, many)


def test_a_budget_in_a_recipe(tmp_path, home):
    path = tmp_path / "recipe.yaml"
    body = {"model": "builtin", "out": str(tmp_path / "a"), "allocate": {"per": "layer", "budget": 4}, "evaluate": None}
    path.write_text(json.dumps(body | {"fisher": {"samples": 2, "seq_len": 64}}))
    ok("run", path)
    manifest = store.read_manifest(tmp_path / "a")
    assert manifest.budget.asked == 4
    assert all(spec.mean_bits == int(spec.mean_bits) for layer in manifest.layers for spec in (layer.key, layer.value))
    ok("run", path, "--bits", 5.5, "--out", tmp_path / "b")
    assert store.read_manifest(tmp_path / "b").budget.asked == 5.5
    measured = body | {"out": str(tmp_path / "c"), "allocate": {"method": "kl", "budget": 4}}
    path.write_text(json.dumps(measured | {"fisher": {"samples": 2, "seq_len": 64}}))
    ok("run", path)
    assert store.read_manifest(tmp_path / "c").budget.asked == 4
    assert (tmp_path / "c.run" / "kl.jsonl").is_file()
    path.write_text(json.dumps(body | {"bits": 0.02, "allocate": None}))
    refused(2, r"bits is 0\.02; .*between 0\.03", "run", path)
