"""Which tokens are kept whole: the ones with the smallest hash ("bottom-k").

The hash depends on the seed, on the content of the token's sequence and on its position, and on nothing else. So the
kept tokens are a uniform sample that does not depend on order, batch size or number of processes, and the sample of
two files' union is cut out of the two samples.
"""

from __future__ import annotations

import hashlib

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


def choose(sequences: np.ndarray, seed: int, keep: int) -> list[np.ndarray]:
    """Kept positions of every sequence of `sequences [N, T]`: the bottom `keep` of all N*T tokens, ascending."""
    positions = np.arange(sequences.shape[1])
    hashes = np.stack([token_hash(seed, sequence_id(row), positions) for row in sequences])
    kept = np.zeros(hashes.size, dtype=bool)
    kept[bottom_k(hashes.ravel(), keep)] = True
    return [np.flatnonzero(row) for row in kept.reshape(hashes.shape)]
