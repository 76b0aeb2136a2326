"""Measuring a run's quantizers with its model: the text held out for it, and KL by layer, role and width.

Every measurement is one line of `kl.jsonl`: one sequence, one layer's keys or values at one width, everything else
exact (`evaluation/isolated.py`). A line names the sequence by its tokens' hash and the quantizers by theirs, so a
second start goes on where the first one ended, more samples or widths only add lines, and lines of other codebooks,
weights or dtypes are passed over. The processes of a launch share out the batches and write one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import PreTrainedModel

from kvcalib.calibration.statistics import CalibrationInfo
from kvcalib.errors import ArtifactMismatch, InputError
from kvcalib.evaluation.isolated import Probe, isolated_kl
from kvcalib.launch import Launch
from kvcalib.model.identity import HARD, SOFT, identify
from kvcalib.model.loading import BUILTIN, input_device, load_tokenizer
from kvcalib.model.text import PRESETS, token_sequences
from kvcalib.rundir import KL_MEASURES, RunDir, fingerprint
from kvcalib.runtime.loader import prove
from kvcalib.stages.allocators import Name
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.fit_nuq import ROLES, Codebooks
from kvcalib.stages.ledger import Ledger
from kvcalib.stages.loading import ModelSettings
from kvcalib.stages.progress import note, progress

MEASURED_WIDTHS = (0, 1, 2, 3, 4, 5, 6)
"""7 and 8 bits are scaled as 6 are: what they do is lost in the rounding of half-precision models."""


class MeasureSettings(ModelSettings):
    """Model and text of measurements; what is None is as the run was calibrated."""

    model: str | None = None
    data: str | None = None
    samples: int = Field(default=8, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    batch_size: int | None = Field(default=None, ge=1)


class Subject:
    """What measurements of a run are made on: held-out text, and the model, which is loaded when first asked for.

    Args:
        loaded: the model, where the caller has it already. here: the processes that measure.
    """

    def __init__(
        self, info: CalibrationInfo, settings: MeasureSettings, loaded: Any = None, here: Launch | None = None
    ) -> None:
        self.info, self.settings, self._loaded, self._here = info, settings, loaded, here or Launch()
        self.name = settings.model or info.model.name
        if settings.model is None and self.name != BUILTIN and "/" not in self.name and not Path(self.name).exists():
            raise InputError(
                f"allocate: the run was calibrated on the local model {self.name!r}, of which only the name is "
                "recorded; give its folder with --model"
            )

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        return self.settings.seq_len or self.info.seq_len

    @property
    def batch_size(self) -> int:
        """Sequences per step."""
        return self.settings.batch_size or max(1, 2048 // self.seq_len)

    def sequences(self, after: int = 0) -> np.ndarray:
        """Token ids `[N, seq_len]`, none of which the calibration has seen.

        From the calibration's own source they are what follows its text (for presets, other crops).

        Args:
            after: sequences to leave out first.

        Raises:
            InputError: there is not one such sequence, or the run was merged from several texts and none is chosen.
        """
        chosen, info = self.settings, self.info
        if chosen.data is None and len(info.texts) > 1:
            raise InputError(
                f"allocate: the run was merged from calibrations of {len(info.texts)} texts, {info.data}; say with "
                "--data which one to go on in, or give another"
            )
        source = chosen.data or info.data
        tokenizer = load_tokenizer(self.name, chosen.revision, chosen.trust_remote_code)
        skip = after
        if source in info.texts and source not in PRESETS:
            skip += -(-info.sequences * info.seq_len // self.seq_len)
        found = token_sequences(source, tokenizer, skip + chosen.samples, self.seq_len, "calibrate", info.seed + 1)
        if len(found) <= skip:
            raise InputError(
                f"allocate: data {source!r} gives {len(found)} sequences of {self.seq_len}, of which {skip} are not "
                "held out (calibrated or measured on); give other text with --data, or a smaller --samples"
            )
        if len(found) < skip + chosen.samples:
            note(f"allocate: data {source!r} gives {len(found) - skip} held-out sequences, not {chosen.samples}")
        return found[skip:]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises:
            ArtifactMismatch: it is another one than the run was calibrated on.
        """
        chosen = self.settings
        model = self._loaded
        if model is None:
            model = chosen.load(self.name, self._here.own_device(chosen.device))
        for difference in self.info.model.differences(identify(model), (*HARD, *SOFT)):
            raise ArtifactMismatch(
                f"allocate: the run was calibrated on {self.info.model.name!r}: this model's {difference}; give "
                "--model the same one, or calibrate this one into a folder of its own"
            )
        return model


class Measurements:
    """`kl.jsonl` of a run, as far as it is about one set of quantizers on one model.

    Args:
        key: what the measurements depend on beside sequence, layer, role and width.

    Raises:
        CorruptFile: a line of the file is damaged; names it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.key, self._ledger = key, Ledger(path)
        self.found = self._read()

    def _read(self) -> dict[str, list[Any]]:
        """KL and tokens by `place`."""
        found: dict[str, list[Any]] = {}
        for number, row in self._ledger.rows():
            if row.get("key") != self.key:
                continue
            try:
                found[place(row["text"], (row["layer"], row["role"]), row["bits"])] = [row["kl"], row["tokens"]]
            except KeyError as error:
                raise self._ledger.damaged(number, f"field {error} is missing") from None
        return found

    def add(self, rows: Sequence[tuple[str, Name, int, float, int]]) -> None:
        """Append `(text, (layer, role), bits, kl, tokens)` in one write, on the disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        lines = []
        for text, (layer, role), bits, kl, tokens in rows:
            self.found[place(text, (layer, role), bits)] = [kl, tokens]
            row = {"key": self.key, "text": text, "layer": layer, "role": role, "bits": bits, "kl": kl}
            lines.append({**row, "tokens": tokens})
        self._ledger.append(lines)

    def unite(self, here: Launch) -> None:
        """What all processes of a launch have found becomes known to each; the first one's file gets what it lacks."""
        self.found = here.unite(self.found)
        if here.first and here.size > 1:
            there, found = self._read(), self.found
            self.add([(*named(p), kl, tokens) for p, (kl, tokens) in sorted(found.items()) if p not in there])

    def mean(self, texts: Sequence[str], name: Name, bits: int) -> float:
        """KL of one width over `texts`, nats per token."""
        rows = [self.found[place(text, name, bits)] for text in texts]
        return sum(kl for kl, _ in rows) / sum(tokens for _, tokens in rows)


def place(text: str, name: Name, bits: int) -> str:
    """What a measurement is called: the sequence, the layer's keys or values and the width."""
    return f"{text} {name[0]} {name[1]} {bits}"


def named(place: str) -> tuple[str, Name, int]:
    """What `place` was given."""
    text, layer, role, bits = place.split()
    return text, (int(layer), "key" if role == "key" else "value"), int(bits)


def isolated(
    run_dir: RunDir,
    codebooks: Codebooks,
    layers: Sequence[int],
    subject: Subject,
    sequences: np.ndarray,
    widths: Sequence[int] = MEASURED_WIDTHS,
    here: Launch | None = None,
) -> dict[Name, dict[int, float]]:
    """KL of every layer's keys and values at every width, nats per token; what was measured before is not again.

    Args:
        here: the processes that share the sequences; all of them call this. This one alone if None.
    """
    here = here or Launch()
    names: list[Name] = [(layer, role) for layer in layers for role in ROLES]
    with here.step("kl"):
        key = fingerprint(
            {
                "codebooks": run_dir.settings("fit-nuq"),
                "options": {
                    f"{layer}.{role}": str(codebooks.option(layer, role)) for layer in layers for role in ROLES
                },
                "weights": subject.info.model.weights_sha256,
                "rope": subject.info.model.rope_parameters_sha256,
                "dtype": str(subject.model.dtype),
            }
        )[:16]
        ledger = Measurements(run_dir.file(KL_MEASURES), key)
    ledger.unite(here)
    texts = [text_id(ids) for ids in sequences]
    places = [place(text, name, bits) for text in texts for name in names for bits in widths]
    left = [p for p in places if p not in ledger.found]
    if left and len(left) < len(places):
        note(f"kl: {len(places) - len(left)} of {len(places)} measurements are there, {len(left)} are left")
    if left:
        with here.step("kl"):
            _measure(codebooks, subject, sequences, texts, names, widths, ledger, here)
        ledger.unite(here)
    return {name: {bits: ledger.mean(texts, name, bits) for bits in widths} for name in names}


def _measure(
    codebooks: Codebooks,
    subject: Subject,
    sequences: np.ndarray,
    texts: list[str],
    names: list[Name],
    widths: Sequence[int],
    ledger: Measurements,
    here: Launch,
) -> None:
    """Measure what is missing of this process's share of the batches."""
    model = subject.model
    check_vocabulary(model, sequences, subject.settings.data or subject.info.data)
    rotations = prove(model, sorted({layer for layer, _ in names}))
    # A sliding layer keeps no sinks, as in the packed cache.
    sliding = {shape.index for shape in subject.info.layers if shape.sliding is not None}
    sinks = {layer: 0 if layer in sliding else codebooks.settings.sinks for layer, _ in names}
    device, size, done = input_device(model), subject.batch_size, 0

    def due(start: int) -> dict[tuple[Name, int], list[str]]:
        mine = texts[start : start + size]
        missing = {
            (name, bits): [t for t in mine if place(t, name, bits) not in ledger.found]
            for name in names
            for bits in widths
        }
        return {probe: found for probe, found in missing.items() if found}

    starts = here.mine([start for start in range(0, len(sequences), size) if due(start)])
    left = sum(len(found) for start in starts for found in due(start).values())
    with progress("kl", left, "measurements") as show:
        for start in starts:
            mine, missing = texts[start : start + size], due(start)
            ids = torch.from_numpy(np.ascontiguousarray(sequences[start : start + size])).long().to(device)
            probes = (Probe(*name, codebooks.quantizer(*name, bits), sinks[name[0]]) for name, bits in missing)
            measured = isolated_kl(model, rotations, ids, probes)
            for ((name, bits), wanted), (_, kl) in zip(missing.items(), measured, strict=True):
                rows = [(t, name, bits, x, ids.shape[1]) for t, x in zip(mine, kl, strict=True) if t in wanted]
                ledger.add(rows)
                done += len(rows)
                show(done)


def text_id(ids: np.ndarray) -> str:
    """By which a sequence of token ids `[T]` is known: 16 hex digits of its sha256."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
