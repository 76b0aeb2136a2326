"""What all exports share: the facts they are made from, and files written for another program.

An export is one file and one dataclass here. It turns `Facts` into the bytes of the files that its consumer reads. The
stage `export` gathers the facts from a run or an artifact; `docs/exports.md` says what each target keeps and loses.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvcalib.errors import FolderInUse, InputError
from kvcalib.files import write_bytes
from kvcalib.model.identity import ModelIdentity

FOLDER = "exports"
"""Where exports lie inside an artifact."""
SUFFIXES = (".json", ".safetensors")
MODULE = "model.layers.{}.self_attn"


@dataclass(frozen=True)
class LayerFacts:
    """One layer; what a source does not tell is None.

    Attributes:
        sliding: its window, None if it attends in full.
        key_bits, value_bits: mean code widths.
        key_scale, value_scale: FP8 scales of rotated keys and of values. shared_scale: one for both.
        format: "FP8", "NVFP4", or None: unquantized. losses: predicted loss of each format, nats per token.
    """

    index: int
    kv_heads: int
    head_dim: int
    sliding: int | None = None
    key_bits: float | None = None
    value_bits: float | None = None
    key_scale: float | None = None
    value_scale: float | None = None
    shared_scale: float | None = None
    format: str | None = None
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """A run or an artifact, as exports see it.

    Attributes:
        origin: its folder, for messages. version: of kvcalib. recent: exact last tokens by default.
        estimated: the layers' losses are known up to one factor for all.
    """

    origin: str
    version: str
    model: ModelIdentity
    layers: list[LayerFacts]
    recent: int = 0
    estimated: bool = False


class Export(ABC):
    """One target of `kvcalib export --to`."""

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    """What it can be made from: "run", "artifact"."""
    names: ClassVar[tuple[str, ...]]
    """The files that it writes; the first is the one that `--out FILE` names."""

    @abstractmethod
    def files(self, facts: Facts) -> dict[str, bytes]:
        """Content by file name; the same facts give the same bytes. InputError if the target cannot say `facts`."""

    @abstractmethod
    def notes(self, facts: Facts) -> list[str]:
        """How to use the files, and what of the artifact they do not hold; one sentence or two each."""

    def write(self, facts: Facts, out: Path, overwrite: bool = False) -> list[Path]:
        """Write the files into the folder `out`, or the first as the file `out` and the others beside it.

        Raises:
            FolderInUse: a file of other content is there, and `overwrite` is False. InputError: not writable.
        """
        content = self.files(facts)
        single = out.suffix in SUFFIXES and not out.is_dir()
        folder = out.parent if single else out
        if folder.exists() and not folder.is_dir():
            raise FolderInUse(f"{folder}: is a file, expected a folder; choose another --out")
        paths = {name: out if single and name == self.names[0] else folder / name for name in content}
        for name, path in paths.items():
            there = path.read_bytes() if path.is_file() else None
            if there is not None and there != content[name] and not overwrite:
                raise FolderInUse(f"{path}: is there with other content; choose another --out, or pass --overwrite")
        for name, path in paths.items():
            write_bytes(path, content[name])
        return list(paths.values())


def render(body: Any) -> bytes:
    """`body` as indented JSON with a newline at the end."""
    return (json.dumps(body, indent=2, allow_nan=False) + "\n").encode()


def module_name(template: str, layer: int) -> str:
    """The name of a layer's attention module; InputError unless `template` has one place `{}` for the index."""
    if template.count("{}") != 1 or template.replace("{}", "").strip("{}") != template.replace("{}", ""):
        raise InputError(f"--module is {template!r}, expected one {{}} for the layer's index, as in {MODULE!r}")
    return template.replace("{}", str(layer))


def missing_layers(facts: Facts) -> str:
    """`, without layers 1, 3` if the source does not list all of the model's layers, else nothing."""
    listed = {layer.index for layer in facts.layers}
    absent = [str(i) for i in range(facts.model.num_hidden_layers) if i not in listed]
    more = ", ..." if len(absent) > 8 else ""
    return f"layer{'s' * (len(absent) > 1)} {', '.join(absent[:8])}{more}" if absent else ""
