"""Vector codebooks for `bench/ideas.py`: channels of a head that share one code.

A vector of n channels with b bits has 2^b centroids in n dimensions, by weighted k-means (scikit-learn): a channel
counts by its mean Fisher, a token by its own (k-means knows no weight per element; see LOG.md, *Smoothing the Fisher
weights*). Centroids then give back each channel's mean and deviation, as those of single channels do. What bits each
vector takes is the knapsack's answer, as for channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ideas_fit import Points
from ideas_store import normalised
from sklearn.cluster import KMeans
from torch import Tensor

TOKENS = 4096
ROUNDS = 15


@dataclass
class Book:
    """One vector's centroids `[S, n]`, and the metric `[n]` in which a token's nearest is looked for."""

    centroids: np.ndarray
    metric: np.ndarray

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """The nearest centroids to `x [N, n]`."""
        if len(self.centroids) == 1:
            return np.broadcast_to(self.centroids, x.shape)
        scaled = self.centroids * self.metric
        code = ((scaled**2).sum(1) - 2 * (x * self.metric) @ scaled.T).argmin(1)
        return self.centroids[code]


@dataclass
class Vectors:
    """Keys or values of one layer: `members [V, 2, n]` (head and channel of each of a vector's elements) and books."""

    members: np.ndarray
    books: list[Book]
    relative: bool

    def show(self, x: Tensor) -> Tensor:
        """What attention would read of `x [N, H, D]`."""
        normal, zero, scale = normalised(x, "token") if self.relative else (x.float(), None, None)
        source, out = normal.numpy(), np.empty(x.shape, np.float32)
        for (head, channel), book in zip(self.members, self.books, strict=True):
            out[:, head, channel] = book.rounded(source[:, head, channel])
        found = torch.from_numpy(out)
        if not self.relative:
            return found
        return (zero + scale * found.reshape(len(x), 1, -1)).reshape(x.shape)


def vectors_of(heads: int, dim: int, size: int, pairs: np.ndarray | None) -> np.ndarray:
    """`[V, 2, size]`: neighbouring channels, or the channels of neighbouring RoPE `pairs [D / 2, 2]`."""
    order = np.arange(dim) if pairs is None else pairs.flatten()
    channel = np.tile(order.reshape(-1, size), (heads, 1))
    head = np.repeat(np.arange(heads), dim // size)[:, None].repeat(size, 1)
    return np.stack([head, channel], 1)


def fit(points: Points, members: np.ndarray, relative: bool, most: int) -> tuple[list[list[Book]], np.ndarray]:
    """Books of every vector with 0 to `most` bits, and their predicted losses `[V, most + 1]`, nats per token."""
    x, fisher = points.x.float(), points.gradient.double().square().numpy()
    scale = np.ones((len(x), 1, 1))
    if relative:
        x, _, spread = normalised(x, "token")
        scale = spread.double().numpy()
    values, weights = x.double().numpy(), fisher * scale**2
    step = max(1, len(values) // TOKENS)
    books, losses = [], []
    for head, channel in members:
        v, w = values[:, head, channel], weights[:, head, channel]
        metric = np.sqrt(np.maximum(w.mean(0), 1e-30))
        token = (w / metric**2).mean(1)
        some = slice(None, None, step)
        mine, lost = [], []
        for bits in range(most + 1):
            if bits == 0:
                centroids = (w * v).sum(0, keepdims=True) / np.maximum(w.sum(0), 1e-30)
                book = Book(centroids, metric)
            else:
                means = KMeans(1 << bits, n_init=1, max_iter=ROUNDS, random_state=0)
                means.fit((v * metric)[some], sample_weight=np.maximum(token[some], 1e-12))
                book = Book(means.cluster_centers_ / metric, metric)
                book = Book(_moments_back(book, v, w), metric)
            mine.append(book)
            lost.append((w * (book.rounded(v) - v) ** 2).mean(0).sum() / 2)
        books.append(mine)
        losses.append(lost)
    return books, np.array(losses)


def _moments_back(book: Book, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Centroids moved so that each channel keeps its weighted mean and deviation (`quant/qnorm.py`)."""
    rounded, total = book.rounded(v), np.maximum(w.sum(0), 1e-30)
    mean, mean_q = (w * v).sum(0) / total, (w * rounded).sum(0) / total
    spread, spread_q = ((w * (a - m) ** 2).sum(0) / total for a, m in ((v, mean), (rounded, mean_q)))
    gain = np.sqrt(np.where(spread_q > 0, spread / np.maximum(spread_q, 1e-30), 1.0))
    return gain * (book.centroids - mean_q) + mean
