"""Stage `refine`: an artifact, its model and text to the same artifact with better codebooks.

Half way the state is in a folder beside the new artifact, `OUT.refine`: a run's folder with the settings it is for, and
after every step all numbers that the next one needs. So a command that was killed goes on where it stood and ends in
the same bytes; the folder is removed when the artifact is there, or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from kvcalib import __version__
from kvcalib.artifact import hub, store
from kvcalib.artifact.card import card
from kvcalib.artifact.check import check_tensors
from kvcalib.artifact.manifest import Manifest, Producer, Refined
from kvcalib.errors import ArtifactMismatch, CorruptFile, FolderInUse, InputError, NoGain, NonFiniteActivations
from kvcalib.evaluation.perplexity import evaluate
from kvcalib.files import hash_bytes, read_tensors, write_tensors
from kvcalib.model.identity import HARD, SOFT, ModelIdentity, identify
from kvcalib.model.loading import load_tokenizer
from kvcalib.model.text import pinned_source, token_sequences
from kvcalib.refine.training import Refinement, Schedule, Standing
from kvcalib.rundir import RunDir
from kvcalib.runtime.loader import Artifact, check_fit, load, prove
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.loading import ModelSettings
from kvcalib.stages.progress import note, progress

STAGE, STATE = "refine", "state.safetensors"
SHARED = 32
"""Tokens in a row by which a training sequence is known to hold held-out text."""


class RefineSettings(ModelSettings):
    """Settings of the stage."""

    data: str = "builtin"
    steps: int = Field(default=100, ge=0)
    samples: int = Field(default=128, ge=1, description="Sequences to train on.")
    held_out: int = Field(default=16, ge=1, description="Sequences of the same source to measure on.")
    seq_len: int = Field(default=512, ge=2)
    lr: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(default=None, ge=1)
    every: int = Field(default=10, ge=1, description="Steps between two looks at the held-out text.")
    patience: int = Field(default=3, ge=1, description="Looks without a new best after which it ends.")
    seed: int = Field(default=0, ge=0, lt=2**53)

    def schedule(self, sequences: int) -> Schedule:
        """That of training on so many sequences."""
        size = min(sequences, self.batch_size or max(1, 2048 // self.seq_len))
        return Schedule(self.steps, self.lr, size, self.every, self.patience, self.seed)


@dataclass(frozen=True)
class Text:
    """What is trained on and what is measured on: token ids `[N, T]` int64, and where they came from."""

    data: str
    training: np.ndarray
    held_out: np.ndarray

    @property
    def fingerprints(self) -> tuple[str, str]:
        """sha256 of both."""
        training, held_out = (
            hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() for ids in (self.training, self.held_out)
        )
        return training, held_out


def run(
    artifact: str | Path,
    out: Path,
    settings: RefineSettings,
    model_name: str | None = None,
    overwrite: bool = False,
    model: Any = None,
) -> Manifest:
    """Write to `out` the artifact with codebooks tuned on text; of no steps, its files as they are.

    Args:
        artifact: folder or Hub id. model_name: the one that the artifact names if None.
        overwrite: another artifact at `out`, and another unfinished refinement of it, are replaced.
        model: the loaded model, where the caller has it already.

    Raises:
        NoGain: the held-out divergence is not lower than before; nothing is written.
        InputError: the text cannot be used, or nothing of it would be stored.
        ArtifactMismatch, UnsupportedModel: the model is another one, or cannot be tapped.
        FolderInUse: `out` holds something else, or was being refined with other settings.
    """
    folder = hub.locate(artifact)
    if not settings.steps:
        manifest, content = store.contents(folder)
        store.install(out, content, overwrite)
        return manifest
    base = load(folder)
    if out.resolve() == folder.resolve():
        raise InputError(f"--out {out}: is the artifact that is to be refined; give another folder")
    exact = base.manifest.runtime
    if settings.seq_len <= exact.sinks + exact.recent:
        raise InputError(
            f"--seq-len is {settings.seq_len}: the artifact keeps the first {exact.sinks} and the last {exact.recent} "
            "tokens exact, so nothing of a sequence would be quantized; give longer ones"
        )
    name = model_name or base.manifest.model.name
    text = _text(name, settings)
    if not overwrite:
        _check_out(out, text, settings)
    model = model if model is not None else settings.load(name)
    identity = identify(model)
    for difference in base.manifest.model.differences(identity, (*HARD, *SOFT)):
        raise ArtifactMismatch(
            f"artifact {str(folder)!r} was built for {base.manifest.model.name!r}: this model's {difference}; give "
            "--model the same one, or build an artifact for this one"
        )
    check_fit(base, model)
    check_vocabulary(model, np.concatenate([text.training, text.held_out]), settings.data)
    state = RunDir(out.with_name(out.name + ".refine"), create=True)
    with _kept(state, _subject(base.manifest, identity, model, text, settings), overwrite) as state_file:
        refinement = _train(model, base, text, settings, state_file)
        better = Artifact(base.manifest, refinement.best())
        size = refinement.schedule.batch_size
        before, after = (max(0.0, r.kld) for r in evaluate(model, [base, better], text.held_out, batch_size=size))
        steps = refinement.standing.best[0]
        if not after < before:
            raise NoGain(
                f"refine: the held-out KLD is {after:.6f} nats per token at best, {before:.6f} before: not lower, so "
                f"{out} was not written; try a smaller --lr than {settings.lr:g}, or more text (--samples)"
            )
        fingerprint, held_out = text.fingerprints
        record = Refined(
            steps=steps, data=text.data, fingerprint=fingerprint, held_out_fingerprint=held_out, kld_before=before,
            kld_after=after, lr=settings.lr, seed=settings.seed,
        )  # fmt: skip
        return _write(out, folder, better, record, overwrite)


def _text(name: str, settings: RefineSettings) -> Text:
    """Training and held-out text: of one source, the held-out sequences after those that are trained on.

    Training sequences that hold a piece of held-out text (overlapping crops, documents that occur twice) are left out.
    """
    source = pinned_source(settings.data)
    tokenizer = load_tokenizer(name, settings.revision, settings.trust_remote_code)
    wanted = settings.samples + settings.held_out
    found = token_sequences(source, tokenizer, wanted, settings.seq_len, "calibrate", settings.seed)
    if len(found) <= settings.held_out:
        raise InputError(
            f"refine: data {settings.data!r} gives {len(found)} sequences of {settings.seq_len}, of which "
            f"{settings.held_out} are held out and none is left to train on; give more text, or a smaller --held-out "
            "or --seq-len"
        )
    training, held_out = found[: -settings.held_out], found[-settings.held_out :]
    size = min(SHARED, settings.seq_len)
    kept_apart = {piece for row in held_out for piece in _pieces(row, size)}
    apart = np.array([kept_apart.isdisjoint(_pieces(row, size)) for row in training])
    if not apart.any():
        raise InputError(
            f"refine: data {settings.data!r}: every sequence to train on holds {size} tokens of the held-out text; "
            "give text that does not repeat itself"
        )
    if apart.sum() < settings.samples:
        note(f"refine: data {settings.data!r} gives {apart.sum()} sequences to train on, not {settings.samples}")
    return Text(source, training[apart], held_out)


def _pieces(row: np.ndarray, size: int) -> Iterator[bytes]:
    """All runs of `size` tokens of `row [T]`."""
    raw = row.astype("<i8").tobytes()
    return (raw[8 * start : 8 * (start + size)] for start in range(len(row) - size + 1))


def _check_out(out: Path, text: Text, settings: RefineSettings) -> None:
    """FolderInUse now, and not in minutes, unless `out` is free or may hold what this command has written before."""
    if not (out / store.MANIFEST).is_file():
        return  # what else there may be is refused by the writer
    record = store.read_manifest(out).refined
    expected = (text.data, *text.fingerprints, settings.lr, settings.seed)
    found = record and (record.data, record.fingerprint, record.held_out_fingerprint, record.lr, record.seed)
    if found != expected:
        raise FolderInUse(f"{out}: holds another artifact; choose another --out, or pass --overwrite")


def _subject(
    manifest: Manifest, identity: ModelIdentity, model: Any, text: Text, settings: RefineSettings
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON."""
    schedule = settings.schedule(len(text.training))
    training, held_out = text.fingerprints
    return {
        "version": __version__,
        "artifact": hash_bytes(manifest.encode()),
        "weights_sha256": identity.weights_sha256,
        "rope_parameters_sha256": identity.rope_parameters_sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "data": text.data,
        "training_sha256": training,
        "held_out_sha256": held_out,
        **{name: getattr(schedule, name) for name in ("steps", "lr", "batch_size", "every", "patience", "seed")},
    }


@contextlib.contextmanager
def _kept(state: RunDir, of: dict[str, Any], discard: bool) -> Iterator[Path]:
    """The file of the state of `of`; it and its folder go when the block has written its result or refused it."""
    over = False
    try:
        with state.lock():
            folder = state.parts(STAGE, of, discard)
            try:
                yield folder / STATE
                over = True
            except (NoGain, NonFiniteActivations):
                over = True
                raise
            finally:
                if over:
                    state.drop_parts(STAGE)
    finally:
        if over:  # the marker last, and not before the lock: a folder of anything else would be nobody's
            (state.path / "run.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                state.path.rmdir()


def _train(model: Any, base: Artifact, text: Text, settings: RefineSettings, state: Path) -> Refinement:
    """The refinement with its steps done, from the state in the file `state` on if there is one."""
    rotations = prove(model, sorted(base.quantizers))
    exact = base.manifest.runtime
    schedule = settings.schedule(len(text.training))
    refinement = Refinement(
        model, rotations, base.quantizers, text.training, text.held_out, schedule, exact.sinks, exact.recent
    )
    with refinement.at_work(), progress("refine", schedule.steps, "steps") as show:
        if state.is_file():
            refinement.resume(*_read(state))
            note(f"refine: {refinement.standing.step} of {schedule.steps} steps are done")
        else:
            refinement.begin()
            _save(refinement, state)
        show(refinement.standing.step)
        while not refinement.done:
            refinement.advance()
            _save(refinement, state)
            show(refinement.standing.step)
    if refinement.standing.step < schedule.steps:
        step, look = refinement.standing.step, refinement.standing.best[0]
        note(f"refine: ends at step {step}, the held-out text was best at step {look}")
    return refinement


def _save(refinement: Refinement, path: Path) -> None:
    standing = refinement.standing
    write_tensors(path, refinement.tensors(), {"step": standing.step, "looks": standing.looks})


def _read(path: Path) -> tuple[Standing, dict[str, Tensor]]:
    tensors, found = read_tensors(path)
    try:
        return Standing(int(found["step"]), [(int(step), float(kld)) for step, kld in found["looks"]]), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path}: its metadata is damaged ({error!r}); delete the file to begin anew") from None


def _write(out: Path, folder: Path, better: Artifact, record: Refined, overwrite: bool) -> Manifest:
    """The artifact in `folder` with the centroids of `better`, at `out`."""
    manifest, tensors = store.read(folder)
    for layer, pair in better.quantizers.items():
        for role, quantizer in pair.items():
            tensors[f"layers.{layer}.{role}.codebook"] = quantizer.codebook.ragged()
    manifest = manifest.model_copy(update={"refined": record, "producer": Producer(version=__version__)})
    check_tensors(manifest, tensors)
    return store.write(out, manifest, tensors, card(manifest), overwrite)
