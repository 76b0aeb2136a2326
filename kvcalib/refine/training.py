"""Centroids of all layers together, moved by gradient towards the unquantized model's predictions.

The loss is the forward KL divergence KL(unquantized || quantized), summed over the positions of a batch, its gradient
the one of `stored.py`, and every step one of Adam (Kingma and Ba, arXiv 1412.6980, beta .9 and .95). The steps are
taken in units of each channel: a step of length 1 would move a centroid by the root mean square of what storing takes
from its channel, as the first batch shows it, so `lr` is a share of that. It decays to nothing along half a cosine.
Every few steps held-out text is measured, and what counts in the end are the centroids that did best there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcalib.errors import NonFiniteActivations
from kvcalib.model.frozen import frozen
from kvcalib.model.loading import execution_device, input_device
from kvcalib.model.rotary import Rotation
from kvcalib.model.selftest import attention_layers
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps, find_attention
from kvcalib.quant.quantizer import Quantizer
from kvcalib.refine.divergence import ForwardKL
from kvcalib.refine.stored import Centroids, StoredAttention

BETAS = 0.9, 0.95
EPSILON = 1e-12
ROLES = ("key", "value")
Quantizers = Mapping[int, Mapping[str, Quantizer]]


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and by what.

    Attributes:
        steps: of Adam, at most. lr: the first step's rate, see the module. batch_size: sequences of a step.
        every: steps between two looks at the held-out text. patience: looks without a new best that end it.
        seed: of the order of the sequences.
    """

    steps: int
    lr: float
    batch_size: int
    every: int = 10
    patience: int = 3
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0 on."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    def batch(self, step: int, count: int) -> np.ndarray:
        """Which of `count` sequences step `step` takes: all of them in a new order, again and again."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {e: np.random.default_rng((self.seed, e)).permutation(count) for e in {p // count for p in places}}
        return np.array([orders[p // count][p % count] for p in places])


@dataclass
class Standing:
    """How far a refinement is.

    Attributes:
        step: steps taken. looks: step and held-out KLD of every look, nats per token, the first one at step 0.
    """

    step: int
    looks: list[tuple[int, float]]

    @property
    def best(self) -> tuple[int, float]:
        """Step and KLD of the best look, the first of equal ones."""
        return min(self.looks, key=lambda look: look[1])


class Refinement:
    """Centroids of `quantizers` on their way; one `advance` is one step.

    Args:
        rotations: of the quantizers' layers, as `runtime.loader.prove` returns them.
        training, held_out: token ids `[N, T]` int64.
        sinks, recent: first and last tokens that stay exact, as the artifact's runtime says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: dict[int, Rotation],
        quantizers: Quantizers,
        training: np.ndarray,
        held_out: np.ndarray,
        schedule: Schedule,
        sinks: int = 0,
        recent: int = 0,
    ) -> None:
        self.model, self.rotations, self.schedule = model, rotations, schedule
        self.training, self.held_out = training, held_out
        modules, windows = find_attention(model), attention_layers(model)
        self.layers = {
            layer: {role: Centroids(pair[role], execution_device(modules[layer])) for role in ROLES}
            for layer, pair in quantizers.items()
        }
        exact = {layer: sinks if windows[layer] is None else 0 for layer in self.layers}
        self._handler = StoredAttention(self.layers, exact, recent)
        self._taps: Taps | None = None
        self._state: dict[str, Tensor] = {}
        self.standing = Standing(0, [])

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The model tapped and its weights frozen, as `begin` and `advance` need it; undone at the end."""
        tokens = self.schedule.batch_size * self.training.shape[1]
        with Taps(self.model, self._handler, self.rotations) as self._taps, frozen(self.model, tokens):
            try:
                yield
            finally:
                self._taps = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or the last looks brought nothing new."""
        standing, schedule = self.standing, self.schedule
        since = (standing.step - standing.best[0]) // schedule.every
        return standing.step >= schedule.steps or since >= schedule.patience

    def begin(self) -> None:
        """Look at what storing takes from every channel, and at the held-out text for the first time."""
        ids = self._ids(self.training[self.schedule.batch(0, len(self.training))])
        errors = _Errors(self._handler)
        assert self._taps is not None
        self._taps.handler = errors
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            self._taps.handler = self._handler
        for name, centroids in self._named():
            self._state[f"{name}.unit"] = errors.found[name]
            for kept in ("mean", "square"):
                self._state[f"{name}.{kept}"] = torch.zeros_like(centroids.values, requires_grad=False)
        self._look()

    def advance(self) -> None:
        """One step of Adam on one batch, and a look at the held-out text when it is due.

        Raises:
            NonFiniteActivations: the divergence, or its gradient, has NaN or infinities.
        """
        standing, schedule = self.standing, self.schedule
        ids = self._ids(self.training[schedule.batch(standing.step, len(self.training))])
        with torch.enable_grad():
            loss = self._divergence(ids)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteActivations(
                    f"refine: the divergence of step {standing.step} is {loss.item()}; try --dtype float32 or bfloat16"
                )
            loss.backward()
        rate = schedule.rate(standing.step)
        standing.step += 1
        for name, centroids in self._named():
            self._move(name, centroids, rate)
        if standing.step % schedule.every == 0 or standing.step == schedule.steps:
            self._look()

    def _move(self, name: str, centroids: Centroids, rate: float) -> None:
        """Adam in units of the channels; moments are those of the gradient in these units."""
        mean, square = self._state[f"{name}.mean"], self._state[f"{name}.square"]
        unit = self._state[f"{name}.unit"][centroids.channel]
        step, (slow, slower) = self.standing.step, BETAS
        with torch.no_grad():
            gradient = centroids.values.grad
            assert gradient is not None
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteActivations(
                    f"refine: the gradient of {name} has NaN or infinite elements at step {step}; try --dtype float32 "
                    "or bfloat16"
                )
            gradient = gradient * unit
            mean.lerp_(gradient, 1 - slow)
            square.lerp_(gradient.square(), 1 - slower)
            size = (square / (1 - slower**step)).sqrt() + EPSILON
            centroids.values -= rate * unit * (mean / (1 - slow**step)) / size
            centroids.values.grad = None
        centroids.settle(mean, square)

    def _look(self) -> None:
        """Measure the held-out text; the present centroids are kept if they are the best."""
        total = 0.0
        size = self.schedule.batch_size
        with torch.no_grad():
            for start in range(0, len(self.held_out), size):
                total += float(self._divergence(self._ids(self.held_out[start : start + size])))
        self.standing.looks.append((self.standing.step, total / self.held_out.size))
        if self.standing.best[0] == self.standing.step:
            for name, centroids in self._named():
                self._state[f"{name}.best"] = centroids.values.detach().clone()

    def _divergence(self, ids: Tensor) -> Tensor:
        """KL(unquantized || quantized) summed over `ids [B, T]`, float64."""
        assert self._taps is not None
        with torch.no_grad(), self._taps.bypass():
            expected = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        found = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return ForwardKL.apply(expected, found)

    def _ids(self, sequences: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(sequences)).long().to(input_device(self.model))

    def _named(self) -> Iterator[tuple[str, Centroids]]:
        for layer, pair in self.layers.items():
            for role, centroids in pair.items():
                yield f"layers.{layer}.{role}", centroids

    def best(self) -> dict[int, dict[str, Quantizer]]:
        """The quantizers with the centroids that did best on the held-out text."""
        found: dict[int, dict[str, Quantizer]] = {}
        for layer, pair in self.layers.items():
            found[layer] = {}
            for role, centroids in pair.items():
                with torch.no_grad():
                    centroids.values.copy_(self._state[f"layers.{layer}.{role}.best"])
                found[layer][role] = centroids.quantizer
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that going on from here needs, beside `standing`: on the CPU, by name."""
        present = {f"{name}.values": centroids.values.detach() for name, centroids in self._named()}
        return {name: tensor.cpu() for name, tensor in (self._state | present).items()}

    def resume(self, standing: Standing, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave when things stood as `standing` says, in place of `begin`."""
        self.standing = standing
        for name, centroids in self._named():
            device = centroids.values.device
            with torch.no_grad():
                centroids.values.copy_(tensors[f"{name}.values"])
            for kept in ("unit", "mean", "square", "best"):
                self._state[f"{name}.{kept}"] = tensors[f"{name}.{kept}"].to(device)


class _Errors:
    """Handler that attends as `handler` does and notes what storing takes from every channel.

    Attributes:
        found: float32 `[H * D]` by name of the layer and role, in the units of its codebook.
    """

    def __init__(self, handler: StoredAttention) -> None:
        self._handler = handler
        self.found: dict[str, Tensor] = {}

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """See the class."""
        layer = call.tap.layer
        for role, x in (("key", call.key), ("value", call.value)):
            flat = x[:, :, self._handler.part(x, layer)].transpose(1, 2).flatten(0, 1)
            self.found[f"layers.{layer}.{role}"] = self._handler.layers[layer][role].error(flat)
        return self._handler.attend(call)
