"""Samples, codebooks, corrections and maps for `bench/ideas.py`.

`run` and the calibration file keep squared gradients; maps and feedback need their signs, so `whole_sample` takes keys,
values and gradients of all tokens itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from ideas_store import Map, Scalar
from torch import Tensor

from kvcalib.calibration.fisher import summed_nll
from kvcalib.calibration.statistics import Calibration, rope_pairs
from kvcalib.evaluation.passes import batches
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps
from kvcalib.quant.codebook import Codebook, ladder_slice
from kvcalib.quant.fitting import FitOptions, fit_absolute, fit_relative
from kvcalib.quant.packing import MAX_BITS
from kvcalib.quant.quantizer import Scope
from kvcalib.stages.codebooks import Codebooks, FitNuqSettings, tensor_name
from kvcalib.stages.fit_nuq import ROLES, channel_order

Correction = Literal["none", "fisher", "plain", "mean"]
"""What of a channel's moments its centroids give back: nothing; mean and deviation under the weights of the fit (what
`fit-nuq` does), or with every token alike; the mean alone, every token alike."""
SETTINGS = FitNuqSettings(outliers=0.0, choices=None, feedback=False, value_basis="none")
BLOCK = 16
ANGLES = np.pi / 2 * np.arange(64) / 64


@dataclass
class Points:
    """Tokens of one layer's keys or values: `x`, `gradient [N, H, D]` of the summed NLL."""

    x: Tensor
    gradient: Tensor

    def mapped(self, turned: Map | None) -> Points:
        """The same in a map's channels."""
        return self if turned is None else Points(turned.forth(self.x), turned.gradient(self.gradient))


class _Whole:
    """Handler that keeps keys, values and their gradients of every token."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str, str], list[Tensor]] = {}

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention."""
        for role, x in (("key", call.key), ("value", call.value)):
            if not x.requires_grad:
                x.requires_grad_(True)
            self._keep(call.tap.layer, role, "x", x)
            x.register_hook(lambda g, role=role: self._keep(call.tap.layer, role, "gradient", g))
        return call.plain(call.rotate_new(call.query), call.rotate_new(call.key), call.value)

    def _keep(self, layer: int, role: str, what: str, x: Tensor) -> None:
        flat = x.detach().float().transpose(1, 2).flatten(0, 1).clone()
        self.found.setdefault((layer, role, what), []).append(flat)


def whole_sample(model: Any, rotations: Any, sequences: np.ndarray) -> dict[tuple[int, str], Points]:
    """All tokens of `sequences [N, T]`, by layer and role, in their order."""
    handler = _Whole()
    model.requires_grad_(False)
    with Taps(model, handler, rotations), torch.enable_grad():
        for ids in batches(model, sequences, 1):
            summed_nll(model, ids).backward()
    return {
        (layer, role): Points(*(torch.cat(handler.found[layer, role, what]) for what in ("x", "gradient")))
        for layer in rotations
        for role in ROLES
    }


@dataclass
class Way:
    """How keys or values are stored, apart from their widths.

    Attributes:
        relative: a zero and scale for each token (or token and head), as values have them.
        maps: by layer, or none.
    """

    relative: bool
    scope: Scope = "token"
    correction: Correction = "fisher"
    maps: dict[int, Map] = field(default_factory=dict)


def ladder(points: Points, way: Way) -> Tensor:
    """Codebooks of all widths, uncorrected: `[H, D, 511]` float64."""
    x, fisher = points.x.double().numpy(), points.gradient.double().square().numpy()
    fit = fit_relative if way.relative else fit_absolute
    return fit(x, fisher, "channel", way.scope, FitOptions(outlier_share=0.0, qnorm=False))


def corrected(ladders: Tensor, points: Points, way: Way) -> Tensor:
    """`ladders` with the moments given back that `way` says, float32."""
    if way.correction == "none":
        return ladders.float()
    x, fisher = points.x.double(), points.gradient.double().square()
    if way.relative:
        grouped = x.reshape(len(x), x.shape[1] if way.scope == "head" else 1, -1)
        lower, upper = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = torch.where(upper > lower, (upper - lower) / 2, 1.0)
        fisher = fisher * scale.square().expand_as(grouped).reshape(x.shape)
        x = ((grouped - (upper + lower) / 2) / scale).reshape(x.shape)
    out = ladders.clone()
    for head, dim in np.ndindex(*ladders.shape[:2]):
        values = x[:, head, dim].numpy()
        order = values.argsort()
        weights = fisher[:, head, dim].numpy() if way.correction == "fisher" else np.ones(len(values))
        # Weight, mean and square of all that is rounded to a centroid are differences of these.
        ahead = np.zeros((3, len(values) + 1))
        for power in range(3):
            ahead[power, 1:] = np.cumsum(weights[order] * values[order] ** power)
        for bits in range(1, MAX_BITS + 1):
            part = ladder_slice(bits)
            centres = ladders[head, dim, part].numpy()
            cut = np.searchsorted(values[order], (centres[1:] + centres[:-1]) / 2, side="right")
            share = np.diff(ahead[0, np.concatenate([[0], cut, [len(values)]])])
            out[head, dim, part] = torch.from_numpy(_given_back(centres, share, ahead[:, -1], way.correction))
    return out.float()


def _given_back(centres: np.ndarray, share: np.ndarray, sums: np.ndarray, correction: Correction) -> np.ndarray:
    """`centres [S]` moved as `quant/qnorm.py` moves them: `share [S]` is the weight that each of them stands for,
    `sums` weight, weighted sum and sum of squares before rounding."""
    total = sums[0]
    if total <= 0:
        return centres
    mean, mean_q = sums[1] / total, share @ centres / total
    if correction == "mean":
        return centres + mean - mean_q
    spread = np.sqrt(max(0.0, sums[2] / total - mean**2))
    spread_q = np.sqrt(share @ (centres - mean_q) ** 2 / total)
    return (spread / spread_q if spread_q > 0 else 1.0) * (centres - mean_q) + mean


def losses(ladders: Tensor, points: Points, way: Way) -> Tensor:
    """Predicted loss `[9, H, D]` of every width, nats per token."""
    fisher = points.gradient.double().square()
    found = []
    for bits in range(MAX_BITS + 1):
        book = Codebook.from_ladders(ladders, torch.full(ladders.shape[:2], bits, dtype=torch.uint8))
        error = (Scalar(book, way.relative, way.scope).show(points.x) - points.x).double()
        found.append((fisher * error.square()).mean(0) / 2)
    return torch.stack(found)


def codebooks(tables: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]], calibration: Calibration, scope: Scope):
    """What `allocate` takes, of ladder, loss and weight by layer and role."""
    tensors = {}
    for (layer, role), parts in tables.items():
        for name, tensor in zip(("ladder", "loss", "weight"), parts, strict=True):
            tensors[tensor_name(layer, role, name)] = tensor
        if role == "key":
            tensors[tensor_name(layer, role, "order")] = channel_order(calibration, layer)
    return Codebooks(tensors, SETTINGS.model_copy(update={"value_scale": scope}))


def moments(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Covariance of `x` and second moment of the gradient, `[H, D, D]` each."""
    x = (points.x - points.x.mean(0)).double()
    g = points.gradient.double()
    return tuple((torch.einsum("nhd,nhe->hde", a, a) / len(a)).numpy() for a in (x, g))


def eigenvectors(matrices: np.ndarray) -> np.ndarray:
    """Of symmetric `[H, D, D]`, the largest eigenvalue's first."""
    return np.ascontiguousarray(np.linalg.eigh(matrices)[1][..., ::-1])


def fewest_products(spread: np.ndarray, worth: np.ndarray, pairs: np.ndarray, sweeps: int) -> np.ndarray:
    """Orthogonal `[H, D, D]` that makes `prod_i (u_i' C u_i) (u_i' G u_i)` small, by turns of `pairs [P, 2]`.

    At high rates the least loss of given bits is in proportion to the D-th root of this product; C is the covariance
    `spread [H, D, D]`, G the gradient's second moment `worth`.
    """
    heads, dim, _ = spread.shape
    bases = np.tile(np.eye(dim), (heads, 1, 1))
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    for head in range(heads):
        both = [spread[head].copy(), worth[head].copy()]
        for i, j in np.tile(pairs, (sweeps, 1)):
            score = 0.0
            for a in both:
                cross = 2 * cos * sin * a[i, j]
                first = cos**2 * a[i, i] + sin**2 * a[j, j] + cross
                second = sin**2 * a[i, i] + cos**2 * a[j, j] - cross
                score = score + np.log(np.maximum(first * second, 1e-300))
            best = int(np.argmin(score))
            c, s = cos[best], sin[best]
            turn = np.array([[c, -s], [s, c]])
            for a in both:
                a[[i, j]] = turn.T @ a[[i, j]]
                a[:, [i, j]] = a[:, [i, j]] @ turn
            bases[head][:, [i, j]] = bases[head][:, [i, j]] @ turn
    return bases


def pair_turns(points: Points, calibration: Calibration, layer: int, kind: str) -> Map:
    """A rotation of every RoPE pair of a key, which commutes with RoPE: `pca` or `fisher` (`fewest_products`)."""
    partner = next(shape.partner for shape in calibration.info.layers if shape.index == layer)
    spread, worth = moments(points)
    if kind == "pca":
        worth = np.broadcast_to(np.eye(spread.shape[1]), spread.shape)
    return Map.orthogonal(fewest_products(spread, worth, np.array(rope_pairs(partner)), 1))


def block_map(points: Points, calibration: Calibration, layer: int) -> Map:
    """PCA of a key's channels within blocks of 8 neighbouring RoPE pairs: what one product of matrix units undoes."""
    partner = next(shape.partner for shape in calibration.info.layers if shape.index == layer)
    spread, _ = moments(points)
    basis = np.zeros_like(spread)
    order = np.array(rope_pairs(partner)).flatten()
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        inside = np.ix_(range(len(spread)), block, block)
        basis[inside] = eigenvectors(spread[inside])
    return Map.orthogonal(basis)


def head_map(points: Points, kind: str) -> Map:
    """A map of each head's channels: `spread` (PCA), `both` (`fewest_products`), `klt` (PCA in the gradient's metric;
    not orthogonal)."""
    spread, worth = moments(points)
    if kind == "klt":
        dim = spread.shape[1]
        worth = worth + 0.01 * np.trace(worth, axis1=1, axis2=2)[:, None, None] / dim * np.eye(dim)
        value, vector = np.linalg.eigh(worth)
        root = (vector * np.sqrt(value)[:, None]) @ vector.transpose(0, 2, 1)
        turn = root @ eigenvectors(root @ spread @ root)
        # Scaled so that one step is worth as much in every channel; the codebooks take care of the rest.
        turn /= np.linalg.norm(turn, axis=(1, 2), keepdims=True) / np.sqrt(dim)
        return Map(torch.from_numpy(turn).float(), torch.from_numpy(np.linalg.inv(turn)).float())
    if kind == "both":
        first = eigenvectors(spread)
        turned = (first.transpose(0, 2, 1) @ a @ first for a in (spread, worth))
        rows, columns = np.triu_indices(spread.shape[1], 1)
        return Map.orthogonal(first @ fewest_products(*turned, np.stack([rows, columns], 1), 3))
    return Map.orthogonal(eigenvectors(spread))
