"""What an idea of `bench/ideas.py` would store: codebooks, widths within the budget, and what is added to them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ideas_fit import Points, Way, block_map, codebooks, corrected, head_map, ladder, losses, pair_turns, whole_sample
from ideas_store import Map, Scalar, Stored, curvature_of, exact_logits, left_by_feedback, replay
from ideas_temperature import scaled, spreads
from ideas_vector import Vectors, fit, vectors_of

from kvcalib.allocation.budget import solve
from kvcalib.allocation.fisher import Table as Losses
from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.model.identity import identify
from kvcalib.model.selftest import full_attention_layers
from kvcalib.quant.feedback import Feedback
from kvcalib.runtime.loader import prove
from kvcalib.stages.fit_nuq import ROLES
from kvcalib.stages.options import POSITION_BITS, Found, within

SCALE_BITS, WORD = 32, 32
MOST_BITS = {2: 6, 4: 8}
"""Of a vector, by its number of channels."""


@dataclass(frozen=True)
class Idea:
    """One row.

    Attributes:
        part: which of the ideas it belongs to.
        key_map, value_map: names of maps in `ideas_fit`. static: values stored as keys are, without scales.
        scope: what shares a value's scale. correction: see `ideas_fit.Correction`.
        temperature: key centroids scaled about their mean until scores vary as they did, over `tokens` alike or as
            `attention` sees them.
        feedback: error feedback while rounding. widths_know: the widths are then found by what feedback leaves.
        spend: whether the words of scales that are not there go to codes. group: channels that share a width.
        vector: channels that share a code, 0 for none.
    """

    part: str
    name: str
    key_map: str = ""
    value_map: str = ""
    static: bool = False
    scope: str = "token"
    correction: str = "fisher"
    temperature: str = ""
    feedback: bool = False
    widths_know: bool = False
    spend: bool = True
    group: int = 16
    vector: int = 0


@dataclass
class Subject:
    """A model with its calibration, the sample of it and the held-out text."""

    name: str
    model: Any
    rotations: Any
    calibration: Calibration
    points: dict[tuple[int, str], Points]
    calibrating: np.ndarray
    sequences: np.ndarray
    expected: list[torch.Tensor]
    _known: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str, model: Any, calibrating: np.ndarray, sequences: np.ndarray) -> Subject:
        """Calibrate `model` on token ids `[N, T]`."""
        rotations = prove(model, full_attention_layers(model))
        # Two sequences tell the shapes; the sample is taken whole, with the gradients' signs.
        settings = PassSettings("bench", 0, 64, 5, 2, "0" * 64)
        calibration = run_pass(model, rotations, calibrating[:2], identify(model), settings)
        points = whole_sample(model, rotations, calibrating)
        return cls(name, model, rotations, calibration, points, calibrating, sequences, exact_logits(model, sequences))

    def once(self, key: Any, make: Any) -> Any:
        """`make()`, kept under `key`."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def map(self, layer: int, role: str, kind: str) -> Map | None:
        """The map of one layer's keys or values, None for none."""
        if not kind:
            return None
        points = self.points[layer, role]
        if kind == "blocks":
            return self.once((layer, kind), lambda: block_map(points, self.calibration, layer))
        if kind in ("pca", "fisher"):
            return self.once((layer, kind), lambda: pair_turns(points, self.calibration, layer, kind))
        return self.once((layer, role, kind), lambda: head_map(points, kind))

    def tables(self, role: str, kind: str, way: Way) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ladder, losses and mean Fisher of every layer, in the channels of the map."""
        made = {}
        for layer in self.rotations:
            points = self.points[layer, role].mapped(self.map(layer, role, kind))
            which = (layer, role, kind, way.relative, way.scope)
            plain = self.once(which, lambda points=points: ladder(points, way))
            ladders = corrected(plain, points, way)
            weight = points.gradient.double().square().mean(0).float()
            made[layer] = ladders, losses(ladders, points, way), weight
        return made


def plan(subject: Subject, idea: Idea, budget: float) -> tuple[Stored, float]:
    """What the idea would store within `budget` effective bits, and the effective bits that this takes."""
    ways = {
        "key": Way(False, "token", idea.correction),
        "value": Way(not idea.static, idea.scope, idea.correction),
    }
    kinds = {"key": idea.key_map, "value": idea.value_map}
    found = {
        (layer, role): parts
        for role in ROLES
        for layer, parts in subject.once(
            ("tables", role, kinds[role], ways[role].relative, ways[role].scope, idea.correction),
            lambda role=role: subject.tables(role, kinds[role], ways[role]),
        ).items()
    }
    books = codebooks(found, subject.calibration, idea.scope)
    layers = sorted(subject.rotations)
    # Without scales a row of values has 32 bits less; their words may take them.
    elements = sum(parts[2].numel() for parts in found.values())
    spared = SCALE_BITS * len(layers) / elements if idea.static else 0.0
    asked = budget + (spared if idea.spend else 0.0)
    # In a basis of its own a key has no RoPE pairs.
    mixed = idea.key_map in ("spread", "blocks")
    pairs = {s.index: None if mixed else torch.tensor(rope_pairs(s.partner)) for s in subject.calibration.info.layers}

    def curvature(layer: int, role: str) -> torch.Tensor:
        return curvature_of(subject.points[layer, role].mapped(subject.map(layer, role, kinds[role])).gradient)

    def share(layer: int, role: str, widths: torch.Tensor) -> torch.Tensor:
        own = curvature(layer, role)
        return left_by_feedback(own, Feedback.from_curvature(own, widths))

    def spend(lost: dict[Any, torch.Tensor]) -> Found:
        tables = {name: Losses(loss, pairs[name[0]] if name[1] == "key" else None) for name, loss in lost.items()}
        return within(books, subject.calibration, layers, asked, "channel", idea.group, tables)

    chosen = spend({name: parts[1] for name, parts in found.items()})
    if idea.widths_know:
        chosen = spend({name: found[name][1] * share(*name, widths) for name, widths in chosen.widths.items()})
    stored = {}
    for (layer, role), widths in chosen.widths.items():
        quantizer = chosen.codebooks.quantizer(layer, role, widths)
        way = ways[role]
        feedback = Feedback.from_curvature(curvature(layer, role), widths) if idea.feedback else None
        stored[layer, role] = Scalar(
            quantizer.codebook, way.relative, way.scope, subject.map(layer, role, kinds[role]), feedback
        )
    return stored, chosen.effective_bits - spared


def plan_vectors(subject: Subject, idea: Idea, budget: float) -> tuple[Stored, float]:
    """The same for vectors: bits of every vector by the knapsack, rows of whole words."""
    most, names, fits = MOST_BITS[idea.vector], [], []
    for shape in subject.calibration.info.layers:
        for role in ROLES:
            pairs = np.array(rope_pairs(shape.partner)) if role == "key" and shape.partner else None
            members = vectors_of(shape.kv_heads, shape.head_dim, idea.vector, pairs)
            points = subject.points[shape.index, role]
            made = subject.once(
                ("vectors", idea.vector, shape.index, role),
                lambda points=points, members=members, role=role: fit(points, members, role == "value", most),
            )
            names.append((shape.index, role, members))
            fits.append(made)
    elements = sum(members.shape[0] * members.shape[2] for _, _, members in names)
    fixed = POSITION_BITS + SCALE_BITS * sum(role == "value" for _, role, _ in names)
    lost = np.concatenate([lost for _, lost in fits])
    cost = np.broadcast_to(np.arange(most + 1), lost.shape)
    room = int(budget * elements) - fixed
    while True:
        choice = np.split(solve(lost, cost, room).choice, np.cumsum([len(members) for *_, members in names])[:-1])
        taken = fixed + sum(WORD * -(-int(bits.sum()) // WORD) for bits in choice)
        if taken <= budget * elements:
            break
        room -= 1
    stored: Stored = {}
    for (layer, role, members), bits, (books, _) in zip(names, choice, fits, strict=True):
        picked = [book[b] for book, b in zip(books, bits, strict=True)]
        stored[layer, role] = Vectors(members, picked, role == "value")
    return stored, taken / elements


def measure(subject: Subject, idea: Idea, budget: float) -> dict[str, Any]:
    """One row."""
    began = time.process_time()
    stored, bits = (plan_vectors if idea.vector else plan)(subject, idea, budget)
    if idea.temperature:
        few = subject.calibrating[:4]
        for _ in range(2):
            factors = spreads(subject.model, subject.rotations, stored, few, idea.temperature)
            stored = {
                (layer, role): scaled(part, factors[layer], subject.points[layer, role].x) if role == "key" else part
                for (layer, role), part in stored.items()
            }
    kld = replay(subject.model, subject.rotations, stored, subject.sequences, subject.expected)
    return {
        "model": subject.name,
        "part": idea.part,
        "name": idea.name,
        "budget": budget,
        "effective_bits": bits,
        "kld": float(kld.mean()),
        "sequence_kld": kld.tolist(),
        "seconds": time.process_time() - began,
    }
