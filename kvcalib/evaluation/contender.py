"""What a comparison compares: ways to keep one model's KV cache, under one name each.

    with contender.run(model) as session:
        cache, logits = session.read(prompt)
        logits = session.decode(ids, cache)
        contender.nbytes(cache)

An artifact is one (`ArtifactContender`), the unquantized cache another (`Unquantized`); `baselines/` holds the others'
methods. Bytes are counted alike for all: every tensor that the cache holds, and effective bits are those bytes times 8
over the key and value elements of the unquantized cache of the same tokens.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from kvcalib.evaluation.trials import Session, Trial, cache_bytes
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import Artifact, Prefill, prove


class Contender(ABC):
    """One way to keep a model's KV cache.

    Attributes:
        name: what tables and JSON call it; with its settings where they are not the default ones (`kivi:bits=4`).
        source: paper or package that it is taken from, one line.
        evicts: it lets tokens go after a prompt, which one pass over a text does not show.
    """

    name: str
    source: str = ""
    evicts: bool = False

    @abstractmethod
    def run(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Session]:
        """The model on such caches until the end of the block; afterwards it is as it was."""

    def nbytes(self, cache: DynamicCache) -> float:
        """Bytes of everything that `cache` holds; elements of a stock cache count at 16 bits."""
        return cache_bytes(cache)

    @property
    def settings(self) -> dict[str, Any]:
        """What it was told, for JSON."""
        return {}


class Unquantized(Contender):
    """The model's own cache, in the model's dtype; its bytes count at 16 bits an element."""

    name = "fp16"
    source = "transformers.DynamicCache"

    @contextlib.contextmanager
    def run(self, model: PreTrainedModel) -> Iterator[Session]:
        yield Session(model, None)


class ArtifactContender(Contender):
    """An artifact of kvcalib, attached.

    Args:
        name: default the folder's name.
        sinks, recent, prefill, eviction: as `kvcalib.attach`.
    """

    def __init__(
        self,
        artifact: Artifact,
        name: str | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        prefill: Prefill = "quantized",
        eviction: Eviction | None = None,
    ) -> None:
        self.trial = Trial(artifact, eviction)
        self.artifact, self.sinks, self.recent, self.prefill = artifact, sinks, recent, prefill
        self.name = name or (artifact.path.name if artifact.path else "artifact")
        self.source, self.evicts = "kvcalib", eviction is not None

    @contextlib.contextmanager
    def run(self, model: PreTrainedModel) -> Iterator[Session]:
        rotations = prove(model, sorted(self.artifact.quantizers))
        with self.trial.run(model, rotations, self.sinks, self.recent, self.prefill) as session:
            yield session

    @property
    def settings(self) -> dict[str, Any]:
        default = self.artifact.manifest.runtime
        return {
            "sinks": default.sinks if self.sinks is None else self.sinks,
            "recent": default.recent if self.recent is None else self.recent,
            "prefill": self.prefill,
            "eviction": self.trial.described,
        }
