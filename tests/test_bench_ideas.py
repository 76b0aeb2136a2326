"""bench/ideas.py on a tiny model: its simulation is the quantizer's, its maths holds, its rows come out."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.model.identity import identify
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.fitting import FitOptions, fit_absolute, fit_relative, make_quantizer, predicted_loss
from kvcalib.runtime.loader import load
from kvcalib.stages import build, fit_nuq
from tests.tiny import make_run, tiny_llama, tokens

BENCH = str(Path(__file__).parents[1] / "bench")
NAMES = ("ideas", "ideas_fit", "ideas_plan", "ideas_store", "ideas_temperature", "ideas_vector")
BITS = 2.5


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, BENCH)
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(BENCH)
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def subject(parts):
    return parts["ideas_plan"].Subject.make("tiny", tiny_llama(), tokens(4, 48, 1).numpy(), tokens(3, 48, 2).numpy())


def random_map(parts, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(2, 16, 16)))
    return parts["ideas_store"].Map.orthogonal(basis)


def test_sample_is_the_calibration_s(subject):
    """Every token's keys and squared gradients are those that `fisher` keeps."""
    settings = PassSettings("test", 0, subject.calibrating.size, 5, 2, "0" * 64)
    kept = run_pass(subject.model, subject.rotations, subject.calibrating, identify(subject.model), settings)
    place = torch.from_numpy(np.argsort(np.lexsort((kept.tensors["sample.position"], kept.tensors["sample.sequence"]))))
    assert len(place) == subject.calibrating.size
    for role in ("key", "value"):
        points = subject.points[1, role]
        for ours, theirs in ((points.x, "sample."), (points.gradient.square(), "sample.{}_fisher")):
            theirs = kept.layer(1)[f"sample.{role}" if ours is points.x else f"sample.{role}_fisher"]
            ours, theirs = (t.flatten(1).double().sum(1).sort().values for t in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("scope", ["token", "head"])
def test_codebooks_and_losses_are_those_of_fit_nuq(parts, subject, role, scope):
    fits, points = parts["ideas_fit"], subject.points[0, role]
    way = fits.Way(role == "value", scope)
    ours = fits.corrected(fits.ladder(points, way), points, way)
    x, fisher = points.x.double().numpy(), points.gradient.double().square().numpy()
    fit = fit_absolute if role == "key" else fit_relative
    theirs = fit(x, fisher, "channel", scope, FitOptions(outlier_share=0.0, qnorm=True))
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
    widths = torch.full((2, 16), 2, dtype=torch.uint8)
    weight = points.gradient.square().mean(0)
    quantizer = make_quantizer(theirs.float(), widths, role == "value", scope, 0.0, weight)
    expected = predicted_loss(quantizer, points.x, points.gradient.square(), torch.float16)
    torch.testing.assert_close(fits.losses(ours, points, way)[2], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("feedback", [False, True])
def test_simulation_measures_what_is_built(parts, subject, tmp_path, feedback):
    """The same widths on packed storage: the same KLD."""
    model, store = tiny_llama(), parts["ideas_store"]
    run = make_run(tmp_path / "run", model, outliers=0.0, choices=None, feedback=feedback)
    codebooks = fit_nuq.Codebooks.load(run)
    names = [(layer, role) for layer in codebooks.layers for role in fit_nuq.ROLES]
    drawn = torch.randint(0, 5, (len(names), 2, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    widths = dict(zip(names, drawn, strict=True))
    build.run(run, tmp_path / "artifact", widths=widths)
    packed = evaluate(model, [load(tmp_path / "artifact")], subject.sequences)[0].kld

    def scalar(layer, role):
        chosen = widths[layer, role]
        fed = Feedback.from_curvature(store.curvature_of(subject.points[layer, role].gradient), chosen)
        book = codebooks.quantizer(layer, role, chosen).codebook
        return store.Scalar(book, role == "value", feedback=fed if feedback else None)

    stored = {name: scalar(*name) for name in names}
    shown = store.replay(model, subject.rotations, stored, subject.sequences, subject.expected)
    assert packed > 1e-3
    assert shown.mean() == pytest.approx(packed, rel=2e-3)


def test_what_feedback_leaves_adds_up_to_the_loss(parts, subject):
    """`e' C e` of damped C is the sum over channels of `d_k` times the squared error that was left to be rounded."""
    store, points = parts["ideas_store"], subject.points[1, "key"]
    widths = torch.randint(1, 3, (2, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    curvature = store.curvature_of(points.gradient)
    feedback = Feedback.from_curvature(curvature, widths)
    error = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for head in range(2):
        g = points.gradient[:, head].double().numpy()
        damped = g.T @ g / len(g)
        damped += 0.1 * np.trace(damped) / 16 * np.eye(16)
        d = store.left_by_feedback(curvature, feedback)[head].numpy() * np.diag(damped)
        lost = 0.0
        for place, channel in enumerate(feedback.order[head].tolist()):
            earlier = feedback.order[head, :place]
            left = error[channel] + feedback.matrix[head, :place, place].double() @ error[earlier]
            lost += d[channel] * float(left) ** 2
        assert lost == pytest.approx(float(error @ torch.from_numpy(damped) @ error), rel=1e-4)
        assert d.min() < 0.9 * np.diag(damped)[d.argmin()]


def test_maps_are_undone_and_keep_gradients(parts, subject):
    points = subject.points[0, "value"]
    for kind in ("spread", "gradient", "both", "klt"):
        turned = parts["ideas_fit"].head_map(points, kind)
        torch.testing.assert_close(turned.inverse(turned.forth(points.x)), points.x, rtol=1e-3, atol=1e-4)
        # dL = g . dx must not depend on the channels: with dx = x.
        before = (points.gradient * points.x).sum((1, 2))
        after = (turned.gradient(points.gradient) * turned.forth(points.x)).sum((1, 2))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    spread, worth = parts["ideas_fit"].moments(points)

    def product(turned):
        u = turned.turn.double().numpy()
        return sum(np.log(np.einsum("hde,hdf,hfe->he", u, a, u)).sum() for a in (spread, worth))

    kinds = {kind: product(parts["ideas_fit"].head_map(points, kind)) for kind in ("spread", "gradient", "both")}
    assert kinds["both"] < min(kinds["spread"], kinds["gradient"], product(random_map(parts)))


def test_turns_of_key_pairs_commute_with_rope(parts, subject):
    points = subject.points[0, "key"]
    for kind in ("pca", "fisher"):
        turned = parts["ideas_fit"].pair_turns(points, subject.calibration, 0, kind)
        angle = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0)) * 6
        cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))

        def rope(x, cos=cos, sin=sin):
            return subject.rotations[0].apply(x.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1)

        x, other = points.x[:5], random_map(parts)
        assert (turned.turn.abs() > 0.1).sum() > 2 * 16
        torch.testing.assert_close(turned.forth(rope(x)), rope(turned.forth(x)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other.forth(rope(x)), rope(other.forth(x)), atol=1e-2)


def test_scaled_keys_give_scores_their_variance_back(parts, subject):
    ideas, temperature = parts["ideas_plan"], parts["ideas_temperature"]
    stored, _ = ideas.plan(subject, ideas.Idea("3", "bare", correction="none"), 1.5)
    few = subject.calibrating[:2]

    def off(stored):
        found = temperature.spreads(subject.model, subject.rotations, stored, few, "tokens")
        return max(float((f - 1).abs().max()) for f in found.values())

    factors = temperature.spreads(subject.model, subject.rotations, stored, few, "tokens")
    moved = {
        name: temperature.scaled(part, factors[name[0]], subject.points[name].x) if name[1] == "key" else part
        for name, part in stored.items()
    }
    assert off(moved) < 0.7 * off(stored)
    exact = {name: Exact() for name in stored}
    assert off(exact) < 1e-5


class Exact:
    def show(self, x):
        return x


def test_vectors_beat_channels_where_channels_are_one(parts):
    """Two channels on a line: one bit each is half wasted, two bits of a pair are not."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(2000, 1, 1))
    x = torch.from_numpy(np.concatenate([line, line], 2)).float()
    points = parts["ideas_fit"].Points(x, torch.ones_like(x))
    members = parts["ideas_vector"].vectors_of(1, 2, 2, None)
    _, lost = parts["ideas_vector"].fit(points, members, False, 3)
    way = parts["ideas_fit"].Way(False, correction="fisher")
    ladders = parts["ideas_fit"].corrected(parts["ideas_fit"].ladder(points, way), points, way)
    scalar = parts["ideas_fit"].losses(ladders, points, way).sum((1, 2))
    assert lost[0, 0] == pytest.approx(float(scalar[0]), rel=1e-5)
    assert lost[0, 2] < 0.5 * float(scalar[1])
    assert (np.diff(lost[0]) < 0).all()


def test_rows_keep_their_budget_and_differ(parts, subject, monkeypatch):
    monkeypatch.setitem(parts["ideas_plan"].MOST_BITS, 2, 4)
    ideas = parts["ideas"]
    chosen = [
        ideas.BASE, ideas.FED, ideas.Idea("4", "V", value_map="both", static=True), ideas.Idea("5", "v", vector=2),
        ideas.Idea("3", "t", temperature="attention"), ideas.Idea("1", "f", feedback=True, group=0),
        ideas.Idea("1", "w", feedback=True, widths_know=True, group=0),
    ]  # fmt: skip
    rows = ideas.with_ratios([ideas.measure(subject, idea, BITS) for idea in chosen])
    assert all(BITS - 0.3 < row["effective_bits"] <= BITS for row in rows)
    assert rows[0]["ratio"] == 1
    assert rows[0]["ratio_error"] == 0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["kld"] / rows[0]["kld"])
    assert len({row["kld"] for row in rows}) == len(rows)


def test_jackknife_of_one_factor_is_nothing(parts):
    base = {"sequence_kld": [0.1, 0.2, 0.4]}
    value, error = parts["ideas"].ratio({"sequence_kld": [0.05, 0.1, 0.2]}, base)
    assert (value, error) == (pytest.approx(0.5), pytest.approx(0, abs=1e-12))
    assert parts["ideas"].ratio({"sequence_kld": [0.1, 0.1, 0.1]}, base)[1] > 0.05


def test_calibrating_on_other_text_has_a_base_of_its_own(parts):
    texts = {
        name: (tokens(4, 32, seed).numpy() // divisor + 3, tokens(2, 32, seed + 1).numpy() // divisor + 3)
        for name, seed, divisor in (("a", 1, 2), ("b", 3, 9))
    }
    rows = parts["ideas"].with_ratios(parts["ideas"].crossed(texts, "tiny", tiny_llama(), BITS))
    assert len(rows) == 3 * 2 * 2
    own = [row for row in rows if row["own"]]
    assert {row["evaluated"] for row in own} == {"a", "b"}
    assert all(row["ratio"] == 1 for row in own)
