"""The pass over the model: squared gradients of pre-RoPE keys and of values, and everything collected beside them.

Weights are frozen; only activations carry gradients, so the backward pass costs about as much as the forward pass.
The loss is the summed NLL of a sequence; the diagonal Fisher information of an element x is `(dL/dx)^2` (KVQuant,
arXiv 2401.18079, section 3.2 and Eq. 7). GQA groups are already summed, because keys are seen before they are repeated.

Batches do not know of each other. Any process may do any of them, each into a `Part`, and the parts are joined.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.calibration.collector import Collector
from kvcalib.calibration.joining import NLL, join_parts
from kvcalib.calibration.part import Part
from kvcalib.calibration.sample import Chosen, choose
from kvcalib.calibration.statistics import Calibration, CalibrationInfo, LayerShape
from kvcalib.errors import NonFiniteActivations
from kvcalib.model.frozen import frozen
from kvcalib.model.identity import ModelIdentity
from kvcalib.model.loading import input_device
from kvcalib.model.rotary import Rotation
from kvcalib.model.selftest import attention_layers
from kvcalib.model.taps import Taps


@dataclass
class PassSettings:
    """What the pass needs to know beside the model and the tokens."""

    data: str
    seed: int
    keep_tokens: int
    window: int
    batch_size: int
    fingerprint: str
    checkpointing: bool | None = None

    def batches(self, sequences: int) -> int:
        """How many batches `sequences` make."""
        return -(-sequences // self.batch_size)


def run_batches(
    model: PreTrainedModel,
    rotations: dict[int, Rotation],
    sequences: np.ndarray,
    chosen: Chosen,
    settings: PassSettings,
    part: Part,
    batches: Sequence[int],
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Run some batches of `sequences [N, T]` through the model and back into `part`, which is complete after each.

    Args:
        rotations: the layers to calibrate (`model.selftest`).
        on_batch: called after each batch, with how many of `batches` are done.

    Raises:
        NonFiniteActivations: NaN or infinity in keys, values, gradients or loss; names layer and stage. InputError:
            the part cannot be written.
    """
    collector = Collector(settings.window, attention_layers(model), part)
    device = input_device(model)
    tokens = settings.batch_size * sequences.shape[1]
    with (
        Taps(model, collector, rotations),
        frozen(model, tokens, settings.checkpointing),
        torch.enable_grad(),
    ):
        for done, batch in enumerate(batches, 1):
            start = batch * settings.batch_size
            rows = sequences[start : start + settings.batch_size]
            kept = chosen.within(start, start + len(rows))
            collector.start(torch.from_numpy(chosen.row[kept] - start), torch.from_numpy(chosen.position[kept]))
            loss = summed_nll(model, torch.from_numpy(np.ascontiguousarray(rows)).long().to(device))
            if not bool(torch.isfinite(loss)):
                raise NonFiniteActivations(
                    f"fisher: the loss of sequences {start}..{start + len(rows) - 1} is {loss.item()}; "
                    "try --dtype float32 or bfloat16, and check the model's weights"
                )
            loss.backward()
            collector.sums.add(NLL, loss.detach().double().cpu())
            collector.commit(batch)
            if on_batch is not None:
                on_batch(done)


def run_pass(
    model: PreTrainedModel,
    rotations: dict[int, Rotation],
    sequences: np.ndarray,
    identity: ModelIdentity,
    settings: PassSettings,
) -> Calibration:
    """The record of all `sequences [N, T]`, in memory: for those who keep no run.

    Raises:
        NonFiniteActivations: as `run_batches`.
    """
    chosen = choose(sequences, settings.seed, settings.keep_tokens)
    with tempfile.TemporaryDirectory() as folder:
        part, path = Part(Path(folder) / "part"), Path(folder) / "calibration"
        run_batches(model, rotations, sequences, chosen, settings, part, range(settings.batches(len(sequences))))
        info = pass_info(identity, settings, sequences, part.layers)
        join_parts(path, [part], chosen, settings.batch_size, info)
        record, _ = Calibration.load(path)
        return Calibration(record.info, dict(record.stored))


def pass_info(
    identity: ModelIdentity, settings: PassSettings, sequences: np.ndarray, layers: Sequence[LayerShape]
) -> CalibrationInfo:
    """What the file of a pass over all `sequences [N, T]` says of itself; the NLL is filled in by `merging.join`."""
    count, length = sequences.shape
    return CalibrationInfo(
        model=identity,
        data=settings.data,
        seed=settings.seed,
        keep_tokens=settings.keep_tokens,
        window=settings.window,
        seq_len=length,
        sequences=count,
        tokens=count * length,
        nll_sum=0.0,
        predicted_tokens=count * (length - 1),
        fingerprint=settings.fingerprint,
        layers=list(layers),
        batches=settings.batches(count),
    )


def summed_nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Summed next-token NLL of full sequences `ids [B, T]`, in nats, float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    # Shifting the targets and not the logits spares the backward pass a copy of all logits.
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
