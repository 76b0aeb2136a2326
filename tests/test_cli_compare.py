"""`kvcalib eval --compare`, and the tasks recall and greedy, as a user meets them."""

import json
import shutil

import pytest
import torch

from kvcalib.calibration.statistics import Calibration
from kvcalib.cli import comparing
from kvcalib.cli.comparing import folded, rounded, with_interval
from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.evaluation.comparison import Comparison, Interval, TaskComparison
from kvcalib.rundir import CALIBRATION
from kvcalib.stages.compare import calibrated_of
from tests.test_cli import VOCABULARY, ok, refused
from tests.tiny import make_artifact, make_run, tiny_llama, tokens

CONTEXT = 200
TEXT = ("--samples", 3, "--seq-len", 64)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with the demo's tokenizer, artifacts of 4 and 2 bits and one of another model, a run, and text."""
    home = tmp_path_factory.mktemp("compare")
    model = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    model.save_pretrained(home / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, home / "model")
    for bits in (4, 2):
        make_artifact(home / f"bits{bits}", model, key_bits=bits, value_bits=bits)
        (home / f"bits{bits}/artifact").rename(home / f"nuq{bits}")
    make_artifact(home / "other", tiny_llama(num_hidden_layers=3))
    (home / "text.jsonl").write_text(
        "".join(json.dumps({"input_ids": row}) + "\n" for row in tokens(12, 64, seed=3).tolist())
    )
    return home


def measure(home, *arguments, artifacts=("nuq4", "nuq2")):
    """The command's output, and what it wrote."""
    out = home / "out.json"
    out.unlink(missing_ok=True)
    named = [home / name for name in artifacts]
    common = ("--model", home / "model", "--data", home / "text.jsonl", "--json", out)
    shown = ok("eval", *named, *common, *arguments).stdout
    return shown, json.loads(out.read_text())


@pytest.fixture
def wide(monkeypatch):
    """A terminal as wide as a pipe is taken for."""
    monkeypatch.setattr(comparing.out_console, "width", 120)


def test_a_narrow_terminal_cuts_no_figure(home, monkeypatch):
    monkeypatch.setattr(comparing.out_console, "width", 80)
    shown, written = measure(home, *TEXT, "--compare", "kivi:bits=2:group=16:residual=16")
    assert "…" not in shown
    for row in Comparison.model_validate(written).rows[1:]:
        for figure in (f"{row.effective_bits:.2f}", f"{row.ppl:.3f}", *with_interval(row.kld).split(" ", 1)):
            assert figure in shown
    assert "in a terminal of 112 columns, or with --json" in shown


def test_artifacts_and_baselines_in_one_table(home, wide):
    shown, written = measure(home, *TEXT, "--compare", "fp16, int:bits=4,kivi:bits=2:group=16:residual=16")
    found = Comparison.model_validate(written)
    assert json.loads(found.model_dump_json()) == written
    fp16, four, two, integer, kivi = found.rows
    assert [row.name for row in found.rows[:3]] == ["fp16", "nuq4", "nuq2"]
    assert (integer.settings["bits"], kivi.settings["residual"]) == (4, 16)
    assert 0 == fp16.kld.value < four.kld.value < two.kld.value
    assert two.effective_bits < four.effective_bits < fp16.effective_bits == 16
    broken = "".join(line[:20].strip() for line in shown.splitlines())
    assert "kivi:group=16:residual=16" in broken
    for row in found.rows[1:]:
        assert row.failed is None
        assert row.kld.low < row.kld.value < row.kld.high < row.kld_p99
        for shown_whole in (row.kld, row.delta_nll):
            assert with_interval(shown_whole) in shown
        assert with_interval(row.top1_agreement, 100) in shown
    for said in ("3 sequences of 64 tokens", "192 positions scored", "baseline: fp16", "bytes a token",
                 f"PPL {fp16.ppl:.3f}", "every position scored", "only 3 sequences", "paired bootstrap"):  # fmt: skip
        assert said in shown
    assert max(len(line) for line in shown.split("text:")[0].splitlines()) <= 120
    assert found.model == str(home / "model")
    assert found.data == str(home / "text.jsonl")


def test_a_single_artifact_measures_as_eval_does(home):
    _, plain = measure(home, *TEXT, artifacts=("nuq2",))
    _, compared = measure(home, *TEXT, "--compare", "fp16", artifacts=("nuq2",))
    row = compared["rows"][1]
    assert row["nll"] == pytest.approx(plain["nll"], rel=1e-6)
    assert row["kld"]["value"] == pytest.approx(plain["kld"], rel=1e-5)
    assert row["top1_agreement"]["value"] == pytest.approx(plain["top1_agreement"])
    assert compared["fp16_nll"] == pytest.approx(plain["fp16_nll"], rel=1e-6)


def test_baselines_need_no_artifact(home):
    shown, written = measure(home, *TEXT, "--compare", "int", artifacts=())
    assert [row["name"] for row in written["rows"]] == ["fp16", "int"]
    assert "not measured" not in shown


def test_recall_greedy_and_costs_beside_the_text(home):
    arguments = ("--samples", 2, "--seq-len", 130, "--recall", "--trials", 1, "--greedy", 400, "--costs")
    shown, written = measure(home, *arguments, "--compare", "int", artifacts=("nuq2",))
    found = Comparison.model_validate(written)
    for row in found.rows:
        points = {(point.kind, point.length) for point in row.recall}
        assert points == {("verbatim", 65), ("verbatim", 130), ("passkey", 130)}
        assert {point.passage for point in row.recall if point.kind == "verbatim"} == {"text"}
        assert {point.trials for point in row.recall} == {1}
        assert (row.greedy.tokens, row.greedy.prompts) == (CONTEXT - 65, 2)
        assert row.prefill_seconds > 0
        assert row.decode_seconds > 0
    assert found.rows[0].greedy.identical == 1
    assert found.rows[1].greedy.first_difference < 50
    assert set(found.protocols) == {"recall", "greedy", "costs"}
    assert "135 tokens fit into the model's context, not 400" in shown
    assert "verbatim: length is 32 tokens" in shown
    assert "passkey: length is 65 tokens" in shown
    assert "repeats 0 % of random tokens, so passages are text" in shown
    for title in ("verbatim recall", "passkey recall", "greedy generations", "costs", "blind"):
        assert title in shown
    assert max(len(line) for line in shown.split("text:")[0].splitlines()) <= 120


def test_the_table_fits_and_says_the_worst_case(home, monkeypatch):
    """A contender that cannot be measured is a row, and the others stay."""
    from kvcalib.evaluation.baselines import integer

    monkeypatch.setattr(integer.Integer, "layer", lambda self, place: 1 / 0)
    shown, written = measure(home, *TEXT, "--compare", "int", artifacts=("nuq4",))
    assert [row["failed"] is None for row in written["rows"]] == [True, True, False]
    assert "int: not measured: ZeroDivisionError" in shown
    refused(2, "no contender could be measured; int: not measured: ZeroDivisionError", "eval", "--model",
            home / "model", "--data", home / "text.jsonl", *TEXT, "--compare", "int")  # fmt: skip


def test_with_a_prompt_eviction_is_measured_beside(home):
    shown, written = measure(
        home, *TEXT, "--keep", 0.4, "--policy", "h2o", "--step", 4, "--compare", "int", artifacts=("nuq4",)
    )
    names = [row["name"] for row in written["rows"]]
    assert names[:3] == ["fp16", "nuq4", "nuq4:h2o:keep=0.4"]
    plain, evicted = written["rows"][1:3]
    assert evicted["cache_bytes"] < 0.6 * plain["cache_bytes"]
    assert evicted["settings"]["eviction"]["policy"] == "h2o"
    assert (written["prompt"], written["scored"]) == (48, 48)
    assert "in passes of 4 tokens" in shown


def test_tasks_alone(home):
    shown, written = measure(home, "--task", "recall", "--samples", 5, "--seq-len", 128, "--passage", "random",
                             "--trials", 2, artifacts=("nuq2",))  # fmt: skip
    found = TaskComparison.model_validate(written)
    assert [row.name for row in found.rows] == ["fp16", "nuq2"]
    assert {point.passage for point in found.rows[1].recall if point.kind == "verbatim"} == {"random"}
    assert found.rows[0].greedy is None
    assert "the unquantized model itself repeats" in shown
    arguments = ("--task", "greedy", *TEXT, "--greedy", 7, "--compare", "int")
    shown, written = measure(home, *arguments, artifacts=("nuq2",))
    found = TaskComparison.model_validate(written)
    assert [(row.name, row.greedy.tokens) for row in found.rows] == [("fp16", 7), ("nuq2", 7), ("int", 7)]
    assert "3 prompts of 32 tokens" in shown
    refused(2, "length is 16 tokens, a passage of 32 tokens twice takes 64", "eval", home / "nuq2", "--model",
            home / "model", "--data", home / "text.jsonl", "--task", "recall", "--seq-len", 16)  # fmt: skip


def test_baselines_that_are_fitted_take_a_run(home):
    spec = "kvquant-published:bits=3"
    _, written = measure(home, *TEXT, "--compare", spec, "--run", home / "bits4/run", artifacts=())
    assert [row["failed"] for row in written["rows"]] == [None, None]
    assert written["rows"][1]["kld"]["value"] > 0
    refused(2, "--compare kvquant-published:bits=3 is fitted to a calibration; give --run", "eval", "--model",
            home / "model", "--data", home / "text.jsonl", *TEXT, "--compare", spec)  # fmt: skip


def test_baselines_get_the_token_sample_of_the_run(tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY)
    run = make_run(tmp_path / "run", model)
    found = calibrated_of(run.path, model)
    sample, _ = Calibration.load(run.file(CALIBRATION))
    assert sorted(found.layers) == [0, 1]
    assert torch.equal(found.layers[1].value, sample.tensors["layers.1.sample.value"])
    assert torch.equal(found.layers[0].key_fisher, sample.tensors["layers.0.sample.key_fisher"])
    assert torch.equal(found.position, sample.tensors["sample.position"])
    assert found.source == str(run.path)
    with pytest.raises(InputError, match="calibrated on another model: this model's num_hidden_layers"):
        calibrated_of(run.path, tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=3))


def test_an_artifact_of_another_model_is_refused(home):
    refused(3, "num_hidden_layers", "eval", home / "other/artifact", "--model", home / "model", "--data",
            home / "text.jsonl", *TEXT, "--compare", "fp16")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "fp16,nothing"), "baseline is 'nothing'.*expected one of: fp16"),
        (("--compare", "int:bits=9"), "baseline 'int': bits is '9'"),
        (("--compare", " , "), "--compare is ' , ', expected names with commas between"),
        (("--compare", "int,int"), "'int.*' is compared twice"),
        (("--compare", "int", "--task", "passkey"), "--compare and --task passkey exclude each other"),
        (("--compare", "int", "--adaptive", "x"), "--adaptive is not measured with --compare"),
        (("--compare", "int", "--prefill", "exact"), "--prefill exact is for sequences with a prompt; give --prompt"),
        (("--compare", "int", "--step", 4), "--step is for sequences with a prompt; give --prompt"),
        (("--compare", "int", "--run", "nowhere"), "--run is for baselines that need a calibration"),
        (("--compare", "int", "--trials", 2), "--trials is for recall; give --recall"),
        (("--compare", "int", "--recall", "--passage", "prose"), "--passage is 'prose'"),
        (("--compare", "int", "--greedy", 3, "--seq-len", 640), "leaves no room in the model's context of 200"),
        (("--compare", "int", "--costs", "--seq-len", 4), "--costs needs sequences of at least 8 tokens, --seq-len is"),
        (("--recall",), "--recall is for a comparison; give --compare as well.*or --task recall"),
        (("--greedy", 4), "--greedy is for a comparison; give --compare as well.*or --task greedy"),
        (("--costs",), "--costs is for a comparison"),
        (("--task", "greedy", "--costs"), "--costs is for a comparison"),
        (("--task", "greedy", "--trials", 2), "--trials is for recall"),
        (("--task", "greedy", "--compare", "int", "--recall"), "--recall and --task greedy exclude each other"),
    ],
)  # fmt: skip
def test_bad_options(home, arguments, message):
    refused(2, message, "eval", home / "nuq4", "--model", home / "model", "--data", home / "text.jsonl", *TEXT,
            *arguments)  # fmt: skip


def test_something_must_be_named(home):
    refused(2, "no ARTIFACT is given; name one, or baselines with --compare", "eval", "--model", home / "model")
    refused(2, "--model is missing: without an ARTIFACT nothing else names the model", "eval", "--compare", "int")


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.0123, 0.0118, 0.01294, "0.0123 [0.0118, 0.0129]"),
        (0.000274, 0.0002, 0.0003, "0.00027 [0.00020, 0.00030]"),
        (1.2345, 1.1, 1.3, "1.23 [1.10, 1.30]"),
        (0.0001, -0.02, 0.03, "0.0001 [-0.0200, 0.0300]"),
        (0.0, 0.0, 0.0, "0.00000 [0.00000, 0.00000]"),
        (123.4, 100.0, 150.0, "123 [100, 150]"),
    ],
)
def test_figures_have_three_digits_and_bounds_as_many_decimals(value, low, high, shown):
    assert with_interval(Interval(value=value, low=low, high=high)) == shown
    assert with_interval(Interval(value=value, low=low, high=high), signed=True) == ("+" * (value > 0)) + shown


def test_shares_are_percent():
    assert with_interval(Interval(value=0.9812, low=0.97, high=1.0), 100) == "98.1 [97.0, 100.0]"
    assert (rounded(0.0353), rounded(2.0), rounded(0.0)) == ("0.0353", "2.00", "0.00000")


def test_long_names_are_broken_behind_colons():
    assert folded("nuq2.5") == "nuq2.5"
    assert folded("kivi:bits=2:group=16:residual=32").splitlines() == ["kivi:bits=2:", "group=16:", "residual=32"]
    assert folded("kvquant-published:bits=2").splitlines() == ["kvquant-published:", "bits=2"]
