"""The report's numbers against the artifact, the calibration and the live cache they are taken from."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from kvcalib.calibration.statistics import Calibration
from kvcalib.errors import CorruptFile, InputError
from kvcalib.evaluation.comparison import Comparison, Interval, RecallPoint, Row
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.files import write_json
from kvcalib.model.footprint import Footprint
from kvcalib.report.data import Report
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import attach, detach, load
from kvcalib.stages import build, report, report_data
from kvcalib.stages.sweep_store import Measures, Record, Store, Subject
from tests.tiny import make_run, tiny_llama, tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run, two artifacts of it, an artifact of another run, and the run's measures."""
    home = tmp_path_factory.mktemp("report")
    model = tiny_llama()
    model.save_pretrained(home / "model")
    run = make_run(home / "run", model, sinks=1)
    for bits in (4, 2):
        build.run(run, home / f"nuq{bits}", bits, bits)
    other = make_run(home / "elsewhere" / "run", tiny_llama(1))
    calibration, _ = Calibration.load(other.file(CALIBRATION))
    calibration.info = calibration.info.model_copy(update={"fingerprint": "f" * 64})
    calibration.save(other.file(CALIBRATION))
    build.run(other, home / "alien", 1, 1)
    loaded = [load(home / name) for name in ("nuq4", "nuq2")]
    rows = evaluate(model, loaded, tokens(3, 40).numpy())
    write_json(run.file("eval.json"), [row.model_dump(mode="json") for row in rows])
    return home


@pytest.fixture(scope="module")
def found(home) -> Report:
    return report.gather(report.find(home / "run"), model=str(home / "model"))


def interval(value):
    return Interval(value=value, low=value * 0.9, high=value * 1.1)


def comparison(**changed):
    def row(name, source, bits, kld, **more):
        return Row(
            name=name, source=source, settings={}, effective_bits=bits, cache_bytes=bits * 100, fp16_cache_bytes=1600.0,
            ppl=math.exp(2 + kld), nll=2 + kld, delta_nll=interval(kld), kld=interval(kld), kld_p99=9 * kld,
            top1_agreement=interval(0.9), **more,
        )  # fmt: skip

    points = [
        RecallPoint(kind=kind, length=64, depth=0.5, trials=4, exact=0.25, tokens=0.75, nll=1.0, blind_nll=4.0)
        for kind in ("passkey", "verbatim")
    ]
    rows = [
        row("fp16", "transformers.DynamicCache", 16, 0.0),
        row("nuq2", "kvcalib", 2.6, 0.1, recall=points),
        row("nuq4", "kvcalib", 4.5, 0.01),
        row("kivi:bits=2", "arXiv 2402.02750", 2.5, 0.4),
        row("int:bits=0", "none", 0, 0.0, failed="bits is 0"),
    ]
    given = {
        "model": "m", "dtype": "float32", "data": "text.jsonl", "samples": 3, "seq_len": 40, "fp16_nll": 2.0,
        "protocol": "one pass.", "created": "2026-11-23T04:00:00Z", "machine": "here", "versions": {"torch": "2"},
        "rows": rows, "notes": ["few sequences."],
    }  # fmt: skip
    return Comparison(**(given | changed))


def test_the_run_finds_its_smallest_artifact_and_no_other_runs(home):
    subject = report.find(home / "run")
    assert subject.artifact.name == "nuq2"
    assert [path.name for path in subject.others] == ["nuq4"]


def test_an_artifact_finds_its_run_and_its_siblings(home):
    subject = report.find(home / "nuq4")
    assert subject.run.path.name == "run"
    assert [path.name for path in subject.others] == ["nuq2"]
    assert report.find(home / "alien").run is None


def test_layers_are_the_artifacts(home, found):
    artifact = load(home / "nuq2")
    assert found.artifact == "nuq2"
    for layer, spec in zip(found.layers, artifact.manifest.layers, strict=True):
        assert layer.bits == (spec.key.mean_bits, spec.value.mean_bits)
        assert layer.loss == (spec.key.predicted_loss, spec.value.predicted_loss)
        for place, role in enumerate(("key", "value")):
            quantizer = artifact.quantizers[spec.index][role]
            assert layer.fisher[place] == quantizer.weight.flatten().tolist()
            assert layer.by_head[place] == [2.0, 2.0]
            stored = quantizer.encode(torch.randn(3, 2, 16), torch.float16)
            exact = stored["outlier_value"].shape[1:].numel() if "outlier_value" in stored else 0
            assert layer.outliers[place] == pytest.approx(exact / 32)


def test_bytes_per_token_are_those_of_a_live_cache(home, found):
    model, artifact = tiny_llama(), load(home / "nuq2")
    held = []
    attach(model, artifact)
    try:
        for length in (128, 256):
            cache = artifact.new_cache(model)
            with torch.no_grad():
                model(input_ids=tokens(1, length), past_key_values=cache)
            held.append(cache.nbytes())
    finally:
        detach(model)
    layers = found.memory.layers
    assert sum(layer.packed for layer in layers) == pytest.approx((held[1] - held[0]) / 128, rel=0.02)
    assert sum(layer.exact for layer in layers) == 2 * 2 * 2 * 2 * 16  # layers, K and V, bytes, heads, head_dim
    assert found.memory.weights == 2 * sum(p.numel() for p in model.parameters())


def test_layers_that_stay_exact_count_at_16_bits(home):
    artifact = load(home / "nuq2")
    size = Footprint(10, 512, {i: (2, 16, 64 if i == 3 else None) for i in range(4)})
    layers = report_data.memory(artifact, size).layers
    assert [(layer.exact, layer.window) for layer in layers] == [(128.0, None)] * 3 + [(128.0, 64)]
    assert [layer.packed == layer.exact for layer in layers] == [False, False, True, True]


def test_densities_are_histograms_of_the_sample(home, found):
    calibration, _ = Calibration.load(home / "run" / CALIBRATION)
    artifact = load(home / "nuq2")
    assert len(found.densities) == 2 * 3
    for one in found.densities:
        x = calibration.layer(one.layer)[f"sample.{one.role}"].double().numpy()
        fisher = calibration.layer(one.layer)[f"sample.{one.role}_fisher"].double().numpy()[:, one.head, one.channel]
        quantizer = artifact.quantizers[one.layer][one.role]
        if one.role == "value":
            flat = np.sort(x.reshape(len(x), -1), axis=1)
            kept = flat.shape[1] - quantizer.outliers
            spans = flat[:, kept - 1 :] - flat[:, : quantizer.outliers + 1]
            start = spans.argmin(1)
            low, high = flat[np.arange(len(x)), start], flat[np.arange(len(x)), start + kept - 1]
            middle, half = (torch.tensor(v).half().double().numpy() for v in ((low + high) / 2, (high - low) / 2))
            normal = (x[:, one.head, one.channel] - middle) / half
            fisher = fisher * half**2
        else:
            normal = x[:, one.head, one.channel]
        inside = [(normal >= a) & (normal < b) for a, b in zip(one.edges, one.edges[1:], strict=False)]
        assert [m.mean() for m in inside] == pytest.approx(list(one.density), abs=2.1 / len(x))
        assert [fisher[m].sum() / fisher.sum() for m in inside] == pytest.approx(list(one.weighted), abs=0.05)
        assert sum(one.density) + one.outside == pytest.approx(1)
        assert len(one.centroids) == 4
        assert one.edges[0] <= min(one.centroids)
        assert one.edges[-1] >= max(one.centroids)
        ranked = np.argsort(-quantizer.weight.flatten().numpy(), kind="stable")
        place = {"greatest Fisher": 0, "median Fisher": len(ranked) // 2}[one.why]
        assert divmod(int(ranked[place]), 16) == (one.head, one.channel)


def test_densities_along_axes(tmp_path):
    """Of values in a basis of their own the histogram is of what lies along an axis, with its own Fisher."""
    run = make_run(tmp_path / "run", tiny_llama(), value_basis="pca")
    build.run(run, tmp_path / "a", 2, 2)
    artifact, (calibration, _) = load(tmp_path / "a"), Calibration.load(run.file(CALIBRATION))
    found, _ = report_data.densities(artifact, calibration)
    assert {one.unit for one in found if one.role == "value"} == {"value, along the head's own axis"}
    for one in found:
        sample = calibration.layer(one.layer)
        x, gradient = (sample[f"sample.{one.role}{part}"][:, one.head].double().numpy() for part in ("", "_gradient"))
        axis = np.eye(x.shape[1])[:, one.channel]
        if one.role == "value":
            axis = artifact.quantizers[one.layer]["value"].basis.matrix[one.head, :, one.channel].double().numpy()
        along, fisher = x @ axis, np.square(gradient @ axis)
        inside = [(along >= a) & (along < b) for a, b in zip(one.edges, one.edges[1:], strict=False)]
        assert [m.mean() for m in inside] == pytest.approx(list(one.density), abs=2.1 / len(x))
        assert [fisher[m].sum() / fisher.sum() for m in inside] == pytest.approx(list(one.weighted), abs=0.05)


def test_the_runs_own_measures_are_taken(home, found):
    rows = {row["artifact"].rsplit("/", 1)[-1]: row for row in json.loads((home / "run/eval.json").read_text())}
    (where,) = found.measurements
    assert [c.name for c in where.contenders] == ["fp16", "nuq4", "nuq2"]
    assert (where.samples, where.seq_len) == (3, 40)
    for c in where.contenders[1:]:
        assert (c.bits, c.kld.value, c.kld.low) == (rows[c.name]["effective_bits"], rows[c.name]["kld"], None)
    predicted = {p.name: p for p in found.predicted}
    assert set(predicted) == {"nuq2", "nuq4"}
    assert predicted["nuq2"].delta_nll == rows["nuq2"]["delta_nll"]
    assert predicted["nuq2"].loss > predicted["nuq4"].loss > 0


def test_comparisons_stand_in_for_the_runs_measures(home, tmp_path):
    write_json(tmp_path / "c.json", comparison().model_dump(mode="json"))
    later = comparison(data="other.jsonl", created="2026-11-24T04:00:00Z")
    write_json(tmp_path / "d.json", later.model_dump(mode="json"))
    found = report.gather(
        report.find(home / "run"), [tmp_path / "c.json", tmp_path / "d.json"], None, str(home / "model")
    )
    assert [where.data for where in found.measurements] == ["text.jsonl", "other.jsonl"]
    assert found.created == "2026-11-24T04:00:00Z"
    where = found.measurements[0]
    assert [(c.name, c.family, c.ours) for c in where.contenders] == [
        ("fp16", "fp16", False), ("nuq2", "kvcalib", True), ("nuq4", "kvcalib", True), ("kivi:bits=2", "kivi", False),
        ("int:bits=0", "int", False),
    ]  # fmt: skip
    assert [(p.kind, p.share, p.nll, p.blind) for p in where.contenders[1].recall] == [
        ("passkey", 0.25, 1.0, 4.0), ("verbatim", 0.75, 1.0, 4.0),
    ]  # fmt: skip
    assert where.notes == ["few sequences"]
    assert where.contenders[4].failed == "bits is 0"
    assert {p.name: p.kld for p in found.predicted} == {"nuq2": 0.1, "nuq4": 0.01}


def test_the_page_is_written_beside_and_is_the_same_every_time(home):
    first = report.run(home / "nuq2", model=str(home / "model"))
    assert first == home / "nuq2.html"
    before = first.read_bytes()
    assert report.run(home / "nuq2", model=str(home / "model")).read_bytes() == before
    text = before.decode()
    assert "artifact nuq2" in text
    assert load(home / "nuq2").manifest.files["tensors.safetensors"] in text
    assert load(home / "nuq2").manifest.calibration.fingerprint in text


def test_an_artifact_alone_has_a_report_too(home, tmp_path, capsys):
    shutil.copytree(home / "nuq2", tmp_path / "a" / "nuq2")
    text = report.run(tmp_path / "a" / "nuq2").read_text()
    for missing in ("Codebooks against the sampled density", "Quality against size", "Recall"):
        assert f"<b>{missing}</b>: <code>kvcalib" in text
    assert 'id="bits"' in text
    assert "give it with --model" in capsys.readouterr().err


def test_a_run_without_an_artifact_has_one(tmp_path):
    make_run(tmp_path / "run", tiny_llama())
    text = report.run(tmp_path / "run").read_text()
    assert "no artifact has been built" in text


def test_a_sweep_is_read_and_what_failed_left_out(tmp_path):
    store = Store(tmp_path / "s.jsonl")
    for key, bits in (("a", 2.0), ("b", None), ("c", 3.0)):
        measures = None if bits is None else Measures(
            effective_bits=bits, cache_bytes=1, fp16_cache_bytes=8, tokens=9, nll=2, fp16_nll=1, delta_nll=0.1,
            kld=1 / bits, top1_agreement=0.9,
        )  # fmt: skip
        store.append(
            Record(
                key=key,
                name=f"n{key}",
                status="failed" if bits is None else "done",
                settings={},
                subject=Subject(weights_sha256="", text_sha256="", dtype="float32"),
                measures=measures,
                seconds={},
                runs={},
                memory=0,
                machine="",
                device="",
                created="",
            )
        )
    assert [(p.name, p.bits, p.kld) for p in report.read_sweep(store.path)] == [("na", 2.0, 0.5), ("nc", 3.0, 1 / 3)]
    store.path.write_text('{"name": 1}\n{"name": 2}\n')
    with pytest.raises(CorruptFile, match="line 1"):
        report.read_sweep(store.path)
    with pytest.raises(InputError, match="not found"):
        report.read_sweep(tmp_path / "none.jsonl")


def test_what_is_wrong_is_named(home, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a run"):
        report.run(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        report.run(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        report.run(home / "nuq2", tmp_path)
    for content, message in (
        ('{"format": "x"}', "field 'format'"),
        ("[]", "field 'format'"),
        (json.dumps({**comparison().model_dump(mode="json"), "samples": "many"}), "samples is 'many'"),
    ):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(CorruptFile, match=message):
            report.run(home / "nuq2", comparisons=[tmp_path / "c.json"])
    with pytest.raises(InputError, match="no such folder"):
        report.run(home / "nuq2", model=str(tmp_path / "none"))
    run = RunDir(tmp_path / "run", create=True)
    with pytest.raises(InputError, match=r"no calibration\.safetensors"):
        report.run(run.path)
