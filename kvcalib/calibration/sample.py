"""Which tokens are kept whole: the ones with the smallest hash ("bottom-k").

The hash depends on the seed, on the content of the token's sequence and on its position, and on nothing else. So the
kept tokens are a uniform sample that does not depend on order, batch size or number of processes, and the sample of
two files' union is cut out of the two samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sequence_id(tokens: np.ndarray) -> int:
    """63-bit hash of a sequence's token ids."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").tobytes()).digest()[:8], "big") >> 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): a bijection that spreads neighbouring integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def token_hash(seed: int, sequence: int, positions: np.ndarray) -> np.ndarray:
    """63-bit hash of each token `(seed, sequence, position)`; int64, same shape as `positions`."""
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(sequence) + _mix(np.asarray([seed], dtype=np.int64).astype(np.uint64)))
        mixed = _mix(start + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(1)).astype(np.int64)


def bottom_k(hashes: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` smallest distinct hashes, ascending by hash."""
    _, first = np.unique(hashes, return_index=True)
    return first[:keep]


@dataclass(frozen=True)
class Chosen:
    """The tokens of some sequences that are kept whole: k of them, in the order of sequences and positions.

    Attributes:
        ids: `[N]`, `sequence_id` of every sequence. row: `[k]`, the sequence's index. position: `[k]`. hash: `[k]`.
    """

    ids: np.ndarray
    row: np.ndarray
    position: np.ndarray
    hash: np.ndarray

    def within(self, start: int, stop: int) -> slice:
        """Which of the k lie in the sequences `start..stop`."""
        first, last = np.searchsorted(self.row, [start, stop])
        return slice(int(first), int(last))


def choose(sequences: np.ndarray, seed: int, keep: int, at_once: int = 1 << 18) -> Chosen:
    """The bottom `keep` of all tokens of `sequences [N, T]`, holding the hashes of about `keep + at_once` at a time.

    Of a token whose sequence stands there twice the first is taken.
    """
    count, length = sequences.shape
    ids = np.array([sequence_id(row) for row in sequences], dtype=np.int64)
    positions, step = np.arange(length), max(1, at_once // length)
    best = np.zeros((3, 0), dtype=np.int64)
    for start in range(0, count, step):
        block = range(start, min(start + step, count))
        hashes = np.stack([token_hash(seed, int(ids[i]), positions) for i in block])
        row, position = (x.ravel() for x in np.indices(hashes.shape))
        best = np.concatenate([best, [hashes.ravel(), row + start, position]], axis=1)
        best = best[:, bottom_k(best[0], keep)]
    hash_, row, position = best[:, np.lexsort((best[2], best[1]))]
    return Chosen(ids, row, position, hash_)
