"""`eval --tasks`: a task of log-likelihoods and one of generations, end to end, from local files, offline."""

import json

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvcalib[eval]'")

from kvcalib.errors import CacheBypassed, InputError
from kvcalib.evaluation import tasks as lm
from kvcalib.evaluation.contender import ArtifactContender, Unquantized
from kvcalib.evaluation.failures import Failures
from kvcalib.model.loading import BUILTIN, load_model, load_tokenizer
from kvcalib.runtime.loader import attach, detach
from kvcalib.stages.tasks import Harness, TaskSettings
from tests.test_cli import ok, refused
from tests.tiny import make_artifact

WORDS = ["return", "value", "list", "string", "path", "file", "name", "type", "class", "object", "index", "error"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tasks as YAML with data in .jsonl files, the demo model and a coarse artifact."""
    home = tmp_path_factory.mktemp("tasks")
    folder = home / "yaml"
    folder.mkdir()
    choices = [
        {"question": f"The {WORDS[i]} of the", "choices": [WORDS[(i + k) % 12] for k in (1, 3, 5)], "gold": i % 3}
        for i in range(12)
    ]
    prompts = [{"question": f"Return the {word} of", "answer": "?"} for word in WORDS[:5]]
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    write(
        folder, "local_choice", choices,
        {**shared, "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}, "acc",
    )  # fmt: skip
    write(
        folder, "local_answer", prompts,
        {**shared, "output_type": "generate_until", "doc_to_target": "answer",
         "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False}}, "exact_match",
    )  # fmt: skip
    away = {**shared, "task": "far_away", "dataset_path": "nobody/has-this-data", "output_type": "generate_until"}
    (folder / "far_away.yaml").write_text(yaml.safe_dump(away | {"doc_to_target": "answer"}))
    model = load_model(BUILTIN)
    artifact = make_artifact(home, model, key_bits=1, value_bits=1, choices=None)
    return home, model, artifact


def write(folder, name, rows, body, metric):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    body |= {
        "task": name,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))


def settings(home, *names, **more):
    return TaskSettings(names=names, include_path=home / "yaml", **more)


def accuracy(model, tokenizer, rows):
    """Of the choice with the most log-likelihood, by hand."""
    right = 0
    for row in rows:
        found = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + " " + choice, return_tensors="pt").input_ids
            first = len(tokenizer(row["question"])["input_ids"])
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
            found.append(sum(logits[i - 1, ids[0, i]].item() for i in range(first, ids.shape[1])))
        right += found.index(max(found)) == row["gold"]
    return right / len(rows)


def test_with_and_without_the_artifact(home, monkeypatch):
    folder, model, artifact = home
    tokenizer = load_tokenizer(BUILTIN)
    seen = []
    close = lm.PackedLM.close
    monkeypatch.setattr(lm.PackedLM, "close", lambda self: (seen.append(self), close(self))[1])
    harness = Harness(settings(folder, "local_choice", "local_answer"), BUILTIN, 128)
    found = harness.run(model, tokenizer, [Unquantized(), ArtifactContender(artifact, "ours")], Failures(), 4)
    rows = [json.loads(line) for line in (folder / "yaml" / "local_choice.jsonl").read_text().splitlines()]
    plain = accuracy(model, tokenizer, rows)
    attach(model, artifact)
    packed = accuracy(model, tokenizer, rows)
    detach(model)
    assert (found["fp16"]["local_choice/acc"], found["ours"]["local_choice/acc"]) == (plain, packed)
    assert "local_answer/exact_match" in found["ours"]
    # The attach really happened: every pass was seen to read the artifact's cache, which takes a fraction of the bytes.
    exact, ours = seen
    assert (exact.contender.name, ours.contender.name) == ("fp16", "ours")
    # One pass at least for the choices, and one per prompt and token generated.
    assert ours.attached_calls > 4
    per_token = [each.cache_bytes / each.cached_tokens for each in seen]
    assert 0 < per_token[1] < per_token[0] / 2


def test_a_bypass_is_not_a_failed_row(home, monkeypatch):
    folder, model, artifact = home
    monkeypatch.setattr(lm.PackedLM, "_model_call", lambda self, inps, *_: self.model(inps).logits)
    harness = Harness(settings(folder, "local_choice"), BUILTIN, 128)
    with pytest.raises(CacheBypassed):
        harness.run(model, load_tokenizer(BUILTIN), [ArtifactContender(artifact)], Failures())


def test_limit_and_fewshot(home, monkeypatch):
    folder, model, _ = home
    lengths = []
    call = lm.PackedLM._model_call
    monkeypatch.setattr(
        lm.PackedLM, "_model_call", lambda self, inps, *more: (lengths.append(inps.shape), call(self, inps, *more))[1]
    )
    asked = settings(folder, "local_choice", limit=2, fewshot=3)
    assert "3 few-shot examples, the first 2 examples" in Harness(asked, BUILTIN, 128).protocol
    found = Harness(asked, BUILTIN, 128).run(model, load_tokenizer(BUILTIN), [Unquantized()], Failures())
    assert found["fp16"]["local_choice/acc"] in (0.0, 0.5, 1.0)
    assert sum(rows for rows, _ in lengths) <= 2 * 3
    assert min(length for _, length in lengths) > 20


def test_the_command(home, tmp_path):
    folder, _, artifact = home
    out = tmp_path / "out.json"
    given = ("eval", artifact.path, "--samples", 2, "--seq-len", 32, "--include-path", folder / "yaml")
    shown = ok(*given, "--model", "builtin", "--tasks", "local_choice,local_answer", "--json", out).stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["fp16", "artifact"]
    for row in rows:
        assert {"local_choice/acc", "local_answer/exact_match"} <= set(row["tasks"])
        assert f"{row['tasks']['local_choice/acc']:.4f}" in shown
    assert "local_choice/acc" in shown
    assert "lm-eval" in json.loads(out.read_text())["protocols"]["tasks"]


def test_what_cannot_be_measured_is_told_before_anything_runs(home, tmp_path):
    folder, _, artifact = home
    given = ("eval", artifact.path, "--model", "builtin", "--include-path", folder / "yaml", "--tasks")
    refused(2, "far_away: its data cannot be reached.*dataset_path is json.*local data_files", *given, "far_away")
    unknown = "names 'hellaswa', which is no task of lm-eval .* and none in .*; there is .*hellaswag"
    refused(2, unknown, *given, "hellaswa")
    refused(2, "--tasks is ',', expected names", *given, ",")
    refused(2, "--task-limit is for tasks of lm-eval", "eval", artifact.path, "--task-limit", 3)
    refused(2, "--tasks and --task passkey exclude", *given, "local_choice", "--task", "passkey")
    refused(2, "no such folder", "eval", artifact.path, "--tasks", "a", "--include-path", tmp_path / "none")


def test_without_the_package(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'kvcalib\[eval\]'"):
        Harness(TaskSettings(names=("a",)), BUILTIN, 128)
