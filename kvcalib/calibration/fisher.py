"""The pass over the model: squared gradients of pre-RoPE keys and of values, and everything collected beside them.

Weights are frozen; only activations carry gradients, so the backward pass costs about as much as the forward pass.
The loss is the summed NLL of a sequence; the diagonal Fisher information of an element x is `(dL/dx)^2` (KVQuant,
arXiv 2401.18079, section 3.2 and Eq. 7). GQA groups are already summed, because keys are seen before they are repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvcalib.calibration.attention import BlockAttention, Drawn, drawn_attention
from kvcalib.calibration.sample import choose, sequence_id, token_hash
from kvcalib.calibration.statistics import Calibration, CalibrationInfo, LayerShape, norm_histogram
from kvcalib.errors import NonFiniteActivations
from kvcalib.model.angles import pair_up, signed_partners
from kvcalib.model.identity import ModelIdentity
from kvcalib.model.loading import input_device
from kvcalib.model.offloaded import elements, is_offloaded
from kvcalib.model.rotary import Rotation
from kvcalib.model.selftest import attention_layers
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps

CHECKPOINT_TOKENS = 4096


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


@dataclass
class _Collector:
    """Handler of the pass: sums and sampled tokens of every tapped layer."""

    window: int
    room: int
    sliding: dict[int, int | None]
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    filled: int = 0
    row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    token: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def start(self, row: Tensor, token: Tensor) -> None:
        """A new batch, of which the tokens `(row, token)` are kept."""
        self.filled += len(self.row)
        self.row, self.token = row, token
        self.seen.clear()

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        layer = call.tap.layer
        if torch.is_grad_enabled():
            # In the first tapped layer nothing upstream needs gradients, so keys and values are where they end.
            for x in (call.key, call.value):
                if not x.requires_grad:
                    x.requires_grad_(True)
            call.key.register_hook(lambda g: self._gradient(layer, "key", g))
            call.value.register_hook(lambda g: self._gradient(layer, "value", g))
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        drawn = None
        if _is_plain(call):
            out, *tensors = BlockAttention.apply(query, key, call.value, call.scaling, self.window)
            drawn = Drawn(*tensors)
        # Gradient checkpointing runs the forward pass twice.
        if layer not in self.seen:
            self.seen.add(layer)
            with torch.no_grad():
                if drawn is None:
                    drawn = drawn_attention(
                        query,
                        key,
                        call.scaling,
                        self.window,
                        call.kwargs.get("softcap"),
                        call.kwargs.get("s_aux"),
                        self.sliding[layer],
                    )
                self._forward(call, drawn)
        return (out.transpose(1, 2), None) if _is_plain(call) else call.plain(query, key, call.value)

    def _forward(self, call: Call, drawn: Drawn) -> None:
        layer = call.tap.layer
        if layer not in self.shapes:
            self.shapes[layer] = _shape(call, self.sliding[layer])
        for role, x in (("key", call.key), ("value", call.value)):
            flat = x.detach().float()
            total = flat.sum((0, 2), dtype=torch.float64)
            self._check(layer, "forward pass", role, total)
            self._add(f"layers.{layer}.{role}.sum", total)
            self._add(f"layers.{layer}.{role}.square_sum", flat.square().sum((0, 2), dtype=torch.float64))
            self._keep(f"layers.{layer}.sample.{role}", x.detach().transpose(1, 2))
        raw = call.query.detach().float()
        grouped = raw.reshape(raw.shape[0], call.key.shape[1], -1, raw.shape[3])
        self._add(f"layers.{layer}.query.outer", (grouped.transpose(2, 3) @ grouped).double().sum(0))
        squared = raw.square().sum(-1).transpose(0, 1).flatten(1)
        self._add(f"layers.{layer}.query.norm_histogram", norm_histogram(squared))
        self._add(f"layers.{layer}.attention.peak_sum", drawn.peak.sum((0, 2), dtype=torch.float64))
        self._add(f"layers.{layer}.attention.peak_square_sum", drawn.peak.square().sum((0, 2), dtype=torch.float64))
        self._keep(f"layers.{layer}.sample.attention_sum", drawn.total.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_peak", drawn.peak.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_late", drawn.late.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_early", drawn.early.transpose(1, 2))
        self._keep(f"layers.{layer}.sample.attention_later_square", drawn.square.transpose(1, 2))
        self.put(f"layers.{layer}.sample.attention_slope", self._turned_back(call, drawn.slope), self.filled)

    def _turned_back(self, call: Call, slope: Tensor) -> Tensor:
        """The sampled tokens' `slope [B, H, T, D]` with respect to the un-rotated key, `[n, H, D]` bfloat16."""
        row, token = self.row.to(slope.device), self.token.to(slope.device)
        kept = slope[row, :, token]
        cos, sin = call.tap.cos, call.tap.sin
        if cos is not None and sin is not None:
            angles = (x.float().expand(slope.shape[0], -1, -1)[row, token][:, None] for x in (cos, sin.neg()))
            # The transpose of a rotation is the rotation the other way.
            kept = call.tap.rotation.apply(kept[:, :, None], *angles)[:, :, 0]
        return kept.to(torch.bfloat16)

    def _gradient(self, layer: int, role: str, gradient: Tensor) -> None:
        fisher = gradient.detach().float().square()
        total = fisher.sum((0, 2), dtype=torch.float64)
        self._check(layer, "backward pass", f"gradient of the {role}", total)
        self._add(f"layers.{layer}.{role}.fisher_sum", total)
        self._keep(f"layers.{layer}.sample.{role}_fisher", fisher.transpose(1, 2))

    def _check(self, layer: int, stage: str, what: str, total: Tensor) -> None:
        # One NaN or infinity anywhere makes the sum one too; looking at every element would cost a pass of its own.
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteActivations(
                f"fisher: layer {layer}: the {what} of the {stage} has NaN or infinite elements; "
                "try --dtype float32 or bfloat16, and check the model's weights"
            )

    def _add(self, name: str, value: Tensor) -> None:
        # Sums live where the layer lives; they are small.
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def _keep(self, name: str, x: Tensor) -> None:
        """Keep this batch's sampled tokens of `x [B, T, ...]`."""
        self.put(name, x[self.row.to(x.device), self.token.to(x.device)], self.filled)

    def put(self, name: str, rows: Tensor, start: int) -> None:
        """Write kept rows at `start`. Room for all is taken at once: small tensors that live on fragment the heap."""
        if name not in self.kept:
            self.kept[name] = torch.empty(self.room, *rows.shape[1:], dtype=rows.dtype)
        self.kept[name][start : start + len(rows)] = rows


def _is_plain(call: Call) -> bool:
    """Whether `BlockAttention` computes this call: causal softmax attention in float32, on a CPU."""
    ordinary = call.mask is None and call.kwargs.get("softcap") is None and call.kwargs.get("s_aux") is None
    return ordinary and call.query.device.type == "cpu" and call.query.dtype == torch.float32


def _shape(call: Call, sliding: int | None) -> LayerShape:
    head_dim = call.key.shape[3]
    cos = call.tap.cos
    signed = signed_partners(call.tap.rotation, head_dim, head_dim if cos is None else cos.shape[-1])
    biased = getattr(getattr(call.tap.module, "k_proj", None), "bias", None) is not None
    return LayerShape(
        index=call.tap.layer,
        query_heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.key.shape[3],
        key_bias_norm=float(elements(call.tap.module, "k_proj.bias").float().norm()) if biased else None,
        sliding=sliding,
        partner=pair_up([abs(s) - 1 for s in signed or [0] * head_dim]),
        scaling=float(call.scaling),
    )


def run_pass(
    model: PreTrainedModel,
    rotations: dict[int, Rotation],
    sequences: np.ndarray,
    identity: ModelIdentity,
    settings: PassSettings,
    resume: tuple[Calibration, int] | None = None,
    on_batch: Callable[[int, Callable[[], Calibration]], None] | None = None,
) -> Calibration:
    """Run `sequences [N, T]` through the model and back, and return the calibration record.

    Args:
        rotations: the layers to calibrate (`model.selftest`).
        resume: record of the first n sequences, and n.
        on_batch: called after every batch with the number of sequences done and a function that makes the
            record so far.

    Raises:
        NonFiniteActivations: NaN or infinity in keys, values, gradients or loss; names layer and stage.
    """
    positions = choose(sequences, settings.seed, settings.keep_tokens)
    collector = _Collector(settings.window, sum(len(p) for p in positions), attention_layers(model))
    done, nll = 0, 0.0
    hashes: list[np.ndarray] = []
    if resume is not None:
        record, done = resume
        nll = record.info.nll_sum
        collector.shapes = {s.index: s for s in record.info.layers}
        collector.filled = len(record.tensors["sample.hash"])
        for name, tensor in record.tensors.items():
            if ".sample." in name:
                collector.put(name, tensor, 0)
            elif not name.startswith("sample."):
                collector.sums[name] = tensor.clone()
        hashes.append(_columns(record.tensors))

    def record_now() -> Calibration:
        return _record(collector, hashes, done, nll, sequences, identity, settings)

    device = input_device(model)
    with Taps(model, collector, rotations), _prepared(model, settings, sequences.shape[1]), torch.enable_grad():
        while done < len(sequences):
            batch = sequences[done : done + settings.batch_size]
            chosen = positions[done : done + len(batch)]
            row = np.repeat(np.arange(len(batch)), [len(c) for c in chosen])
            token = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
            collector.start(torch.from_numpy(row), torch.from_numpy(token))
            ids = torch.from_numpy(np.ascontiguousarray(batch)).long().to(device)
            loss = summed_nll(model, ids)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteActivations(
                    f"fisher: the loss of sequences {done}..{done + len(batch) - 1} is {loss.item()}; "
                    "try --dtype float32 or bfloat16, and check the model's weights"
                )
            loss.backward()
            nll += float(loss.detach().double())
            ids_of = np.array([sequence_id(s) for s in batch], dtype=np.int64)
            columns = [token_hash(settings.seed, int(i), c) for i, c in zip(ids_of, chosen, strict=True)]
            hashes.append(
                np.stack([np.concatenate(columns), ids_of[row], token]) if len(row) else np.zeros((3, 0), int)
            )
            done += len(batch)
            if on_batch is not None:
                on_batch(done, record_now)
    return record_now()


def summed_nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Summed next-token NLL of full sequences `ids [B, T]`, in nats, float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    # Shifting the targets and not the logits spares the backward pass a copy of all logits.
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


@contextlib.contextmanager
def _prepared(model: PreTrainedModel, settings: PassSettings, length: int) -> Iterator[None]:
    """Freeze the weights, and checkpoint long batches and offloaded weights; undone at the end."""
    training = model.training
    # By name: an offloaded parameter is a new object whenever its module has run.
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    model.requires_grad_(False)
    model.eval()
    checkpointing = settings.checkpointing
    if checkpointing is None:
        # Without it the backward pass would keep every offloaded weight that the forward pass has loaded.
        needed = settings.batch_size * length > CHECKPOINT_TOKENS or is_offloaded(model)
        checkpointing = needed and model.supports_gradient_checkpointing
    if checkpointing:
        # Stopped early, a layer's second run would leave its last module with its weight loaded.
        how = {"use_reentrant": False, "early_stop": not is_offloaded(model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        # Checkpointing wants a layer in training mode; its children stay in eval mode, so dropout stays off.
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in frozen)
        model.train(training)


def _columns(tensors: dict[str, Tensor]) -> np.ndarray:
    return np.stack([tensors[f"sample.{n}"].numpy() for n in ("hash", "sequence", "position")])


def _record(
    collector: _Collector,
    hashes: list[np.ndarray],
    done: int,
    nll: float,
    sequences: np.ndarray,
    identity: ModelIdentity,
    settings: PassSettings,
) -> Calibration:
    columns: Any = np.concatenate(hashes, axis=1)
    order = np.argsort(columns[0], kind="stable")
    index = torch.from_numpy(order)
    tensors = {name: tensor.cpu() for name, tensor in collector.sums.items()}
    tensors.update({name: rows[: len(order)][index] for name, rows in collector.kept.items()})
    for row, name in enumerate(("hash", "sequence", "position")):
        tensors[f"sample.{name}"] = torch.from_numpy(columns[row][order].astype(np.int64))
    info = CalibrationInfo(
        model=identity,
        data=settings.data,
        seed=settings.seed,
        keep_tokens=settings.keep_tokens,
        window=settings.window,
        seq_len=sequences.shape[1],
        sequences=done,
        tokens=done * sequences.shape[1],
        nll_sum=nll,
        predicted_tokens=done * (sequences.shape[1] - 1),
        fingerprint=settings.fingerprint,
        layers=[collector.shapes[i] for i in sorted(collector.shapes)],
    )
    return Calibration(info, tensors)
