"""Stage `fisher`: model and text to `calibration.safetensors`.

What is done is on disk after every batch; started again with the same settings, by however many processes, the stage
goes on from there and ends in the same bytes. The processes of a launch share the batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kvcalib.calibration.fisher import PassSettings, pass_info, run_batches
from kvcalib.calibration.joining import join_parts
from kvcalib.calibration.sample import choose
from kvcalib.calibration.statistics import VERSION, Calibration
from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.launch import Launch
from kvcalib.model.identity import identify
from kvcalib.model.loading import input_device, load_tokenizer
from kvcalib.model.selftest import attention_layers
from kvcalib.model.text import pinned_source, token_sequences
from kvcalib.rundir import CALIBRATION, RunDir, fingerprint
from kvcalib.runtime.loader import prove
from kvcalib.stages.fisher_parts import bring_together, check_agreement, share
from kvcalib.stages.loading import ModelSettings
from kvcalib.stages.progress import note, progress

ALONE = Launch()


class FisherSettings(ModelSettings):
    """Settings of the stage; defaults are KVQuant's 16 sequences of 2048 tokens."""

    data: str = "builtin"
    samples: int = Field(default=16, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    keep_tokens: int = Field(default=8192, ge=16)
    batch_size: int | None = Field(default=None, ge=1)
    window: int = Field(default=5, ge=1, description="Queries of the windowed attention maximum (QAQ: 5).")
    seed: int = Field(default=0, gt=-(2**53), lt=2**53)
    sliding: Literal["auto", "yes", "no"] = Field(
        default="auto", description="Whether layers with a sliding window count; auto: if no layer attends in full."
    )


def run(
    run_dir: RunDir,
    model_name: str,
    settings: FisherSettings,
    overwrite: bool = False,
    model: Any = None,
    here: Launch = ALONE,
) -> Calibration | None:
    """Calibrate `model_name` in `run_dir`; an up-to-date result is loaded and not made again.

    Args:
        model: the loaded model, where the caller has it already.
        here: the launch whose processes all call this with the same arguments, and share the batches.

    Returns:
        The calibration; None in a process that does not see the first one's disk.

    Raises:
        InputError, UnsupportedModel, FolderInUse, NonFiniteActivations, ProcessLost: see `kvcalib.errors`.
    """
    with here.step("fisher"):
        tokenizer = load_tokenizer(model_name, settings.revision, settings.trust_remote_code)
        sequences = token_sequences(
            settings.data, tokenizer, settings.samples, settings.seq_len, "calibrate", settings.seed
        )
        if len(sequences) < settings.samples:
            note(f"fisher: data {settings.data!r} gives {len(sequences)} sequences, not {settings.samples}")
        if model is None:
            model = settings.load(model_name, here.own_device(settings.device))
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
        "token_ids_sha256": _hash_ids(sequences),
        "stage_version": VERSION,
    }
    check_agreement(here, recorded)
    with contextlib.ExitStack() as lock:
        done = False
        with here.step("fisher"):
            if here.first:
                lock.enter_context(run_dir.lock())
                done = run_dir.up_to_date("fisher", recorded)
                if not done and not overwrite:
                    run_dir.refuse_other("fisher", recorded)
        if here.same(done):
            note("fisher: up to date")
        else:
            folder = here.in_turn("fisher", lambda: run_dir.parts("fisher", recorded, discard=overwrite))
            with here.step("fisher"):
                rotations = prove(model, choose_layers(model, settings.sliding))
                chosen = choose(sequences, settings.seed, settings.keep_tokens)
            pass_settings = PassSettings(
                pinned_source(settings.data),
                settings.seed,
                settings.keep_tokens,
                settings.window,
                batch_size,
                fingerprint(recorded),
            )
            total = pass_settings.batches(len(sequences))
            part, plan = share(here, folder, total)
            if here.size > 1:
                note(f"fisher: {here.size} processes share {len(plan.left)} batches")
            before = len(sequences) if not plan.left else (total - len(plan.left)) * batch_size
            if plan.kept:
                note(f"fisher: going on after {before} of {len(sequences)} sequences")
            with (
                here.step("fisher"),
                progress("fisher", len(sequences), "sequences") as show,
                _Interruption() as interruption,
            ):
                show(before)

                def on_batch(mine: int) -> None:
                    # The others are about as far; asking them would hold everybody up.
                    reached = min(len(sequences), before + mine * here.size * batch_size)
                    show(reached)
                    interruption.after_batch(reached)

                run_batches(model, rotations, sequences, chosen, pass_settings, part, here.mine(plan.left), on_batch)
            parts = bring_together(here, folder, total)
            with here.step("fisher"):
                if here.first:
                    info = pass_info(identity, pass_settings, sequences, parts[0].layers)
                    join_parts(run_dir.output("fisher", CALIBRATION), parts, chosen, batch_size, info)
                    run_dir.finish("fisher", recorded, [CALIBRATION])
        here.in_turn("fisher", lambda: run_dir.drop_parts("fisher"))
    with here.step("fisher"):
        path = run_dir.file(CALIBRATION)
        return Calibration.load(path)[0] if here.first or path.is_file() else None


def _hash_ids(sequences: np.ndarray) -> str:
    """sha256 of token ids `[N, T]`, row-major, as int64."""
    digest = hashlib.sha256()
    for row in sequences:
        digest.update(row.astype("<i8").tobytes())
    return digest.hexdigest()


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


class _Interruption:
    """Ctrl-C ends the stage after the batch in which the user pressed it."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> _Interruption:
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

    def after_batch(self, done: int) -> None:
        """Stop here if the user wants to."""
        if self.interrupted:
            note(f"fisher: {done} sequences are saved; start the same command again to go on")
            raise KeyboardInterrupt
