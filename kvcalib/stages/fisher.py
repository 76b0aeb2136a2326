"""Stage `fisher`: model and text to `calibration.safetensors`.

The stage saves what it has every two minutes and when it is interrupted; started again with the same settings it goes
on from there and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.calibration.statistics import VERSION, Calibration
from kvcalib.errors import CorruptFile, InputError, UnsupportedModel
from kvcalib.model.identity import identify
from kvcalib.model.loading import input_device, load_tokenizer
from kvcalib.model.selftest import attention_layers
from kvcalib.model.text import token_sequences
from kvcalib.rundir import CALIBRATION, PARTIAL, RunDir, fingerprint
from kvcalib.runtime.loader import prove
from kvcalib.stages.loading import ModelSettings
from kvcalib.stages.progress import note, progress

SAVE_EVERY_SECONDS = 120.0


class FisherSettings(ModelSettings):
    """Settings of the stage; defaults are KVQuant's 16 sequences of 2048 tokens."""

    data: str = "builtin"
    samples: int = Field(default=16, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    keep_tokens: int = Field(default=8192, ge=16)
    batch_size: int | None = Field(default=None, ge=1)
    window: int = Field(default=5, ge=1, description="Queries of the windowed attention maximum (QAQ: 5).")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    sliding: Literal["auto", "yes", "no"] = Field(
        default="auto", description="Whether layers with a sliding window count; auto: if no layer attends in full."
    )


def run(
    run_dir: RunDir, model_name: str, settings: FisherSettings, overwrite: bool = False, model: Any = None
) -> Calibration:
    """Calibrate `model_name` in `run_dir`; an up-to-date result is loaded and not made again.

    Args:
        model: the loaded model, where the caller has it already.

    Raises:
        InputError, UnsupportedModel, FolderInUse, NonFiniteActivations: see `kvcalib.errors`.
    """
    tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
    sequences = token_sequences(
        settings.data, tokenizer, settings.samples, settings.seq_len, "calibrate", settings.seed
    )
    if len(sequences) < settings.samples:
        note(f"fisher: data {settings.data!r} gives {len(sequences)} sequences, not {settings.samples}")
    if model is None:
        model = settings.load(model_name)
    check_vocabulary(model, sequences, settings.data)
    identity = identify(model)
    batch_size = settings.batch_size or max(1, 2048 // settings.seq_len)
    recorded = {
        **settings.model_dump(include={"data", "seq_len", "keep_tokens", "window", "seed", "sliding"}),
        "samples": len(sequences),
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": input_device(model).type,
        "model": identity.name,
        "weights_sha256": identity.weights_sha256,
        "rope_parameters_sha256": identity.rope_parameters_sha256,
        "token_ids_sha256": hashlib.sha256(sequences.astype("<i8").tobytes()).hexdigest(),
        "stage_version": VERSION,
    }
    with run_dir.lock():
        if run_dir.up_to_date("fisher", recorded):
            note("fisher: up to date")
            return Calibration.load(run_dir.file(CALIBRATION))[0]
        if not overwrite:
            run_dir.refuse_other("fisher", recorded)
        layers = choose_layers(model, settings.sliding)
        rotations = prove(model, layers)
        pass_settings = PassSettings(
            settings.data, settings.seed, settings.keep_tokens, settings.window, batch_size, fingerprint(recorded)
        )
        resume = _partial(run_dir, pass_settings.fingerprint)
        if resume is not None:
            note(f"fisher: going on after {resume[1]} of {len(sequences)} sequences")
        with progress("fisher", len(sequences), "sequences") as show, _Saver(run_dir) as saver:

            def on_batch(done: int, record: Callable[[], Calibration]) -> None:
                show(done)
                saver.after_batch(done, record)

            calibration = run_pass(model, rotations, sequences, identity, pass_settings, resume, on_batch)
        calibration.save(run_dir.file(CALIBRATION))
        run_dir.finish("fisher", recorded, [CALIBRATION])
        run_dir.file(PARTIAL).unlink(missing_ok=True)
    return calibration


def choose_layers(model: Any, sliding: str = "auto") -> list[int]:
    """Layers that can be quantized: those that attend in full and, if `sliding` says so, those with a window.

    Raises:
        UnsupportedModel: there is none; says so loudly.
    """
    found = attention_layers(model)
    full = [index for index, window in found.items() if window is None]
    layers = sorted(found) if sliding == "yes" or (sliding == "auto" and not full) else full
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    family = model.config.get_text_config(decoder=True).model_type
    if not layers:
        hint = "use --sliding yes to quantize inside the windows" if found else "all are linear, chunked or shared"
        raise UnsupportedModel(
            f"model_type {family!r}: none of its {total} layers attends in full, so NOTHING would be quantized; {hint}"
        )
    if len(layers) < total:
        note(f"[yellow]note[/]: {total - len(layers)} of {total} layers slide or are linear and keep their stock cache")
    return layers


def check_vocabulary(model: Any, sequences: Any, data: str) -> None:
    """InputError if a token id does not exist in the model."""
    size = model.get_input_embeddings().weight.shape[0]
    if int(sequences.max()) >= size:
        raise InputError(
            f"data {data!r}: token id {int(sequences.max())} found, the model has {size}; tokenizer and model differ"
        )


def _partial(run_dir: RunDir, wanted: str) -> tuple[Calibration, int] | None:
    """What an interrupted run with the same fingerprint left behind."""
    path = run_dir.file(PARTIAL)
    if not path.is_file():
        return None
    try:
        record, _ = Calibration.load(path)
    except CorruptFile:
        return None
    return (record, record.info.sequences) if record.info.fingerprint == wanted else None


class _Saver:
    """Saves the record now and then, and after the batch in which the user pressed Ctrl-C."""

    def __init__(self, run_dir: RunDir) -> None:
        self.path = run_dir.file(PARTIAL)
        self.last = time.monotonic()
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> _Saver:
        try:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: then nobody can press Ctrl-C for it
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        note("fisher: stopping after this batch (Ctrl-C again to stop at once)")

    def after_batch(self, done: int, record: Callable[[], Calibration]) -> None:
        if not self.interrupted and time.monotonic() - self.last < SAVE_EVERY_SECONDS:
            return
        record().save(self.path)
        self.last = time.monotonic()
        if self.interrupted:
            note(f"fisher: {done} sequences are saved; start the same command again to go on")
            raise KeyboardInterrupt
