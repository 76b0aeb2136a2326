"""What a calibration file must satisfy before anything is computed from it.

The shapes of one layer decide the shapes of its tensors; sums of squares are not negative; nothing is NaN or infinite;
positions and RoPE partners are used as indices and lie in range. A file may be larger than memory: types and shapes are
compared when it is opened, numbers when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from kvcalib.calibration.exact import BITS, LOWEST
from kvcalib.calibration.sums import LIMBS, TOP, Decoded
from kvcalib.errors import CorruptFile
from kvcalib.untrusted import first_fault, shown

if TYPE_CHECKING:
    from kvcalib.calibration.statistics import CalibrationInfo, LayerShape
    from kvcalib.streamed import TensorFile

AGAIN = "run `kvcalib fisher` again with --overwrite"
LARGEST = (1 << 53) - 1
MOST_CHANNELS = 1 << 24
HIGHEST = 1023 // BITS
"""The bin of the largest float64."""
SUMS, SAMPLES = (torch.float64,), (torch.float32,)
CODES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Known = dict[str, tuple[tuple[torch.dtype, ...], str, bool]]
"""Name behind `layers.i.`: dtypes, shape in letters, whether negative numbers may occur. n kept tokens, H kv heads, Q
query heads, D channels, T of half a matrix of them, B bins of a histogram."""
KNOWN: Known = {
    **{f"{role}.sum": (SUMS, "HD", True) for role in ("key", "value")},
    **{f"{role}.{name}": (SUMS, "HD", False) for role in ("key", "value") for name in ("square_sum", "fisher_sum")},
    "query.outer": (SUMS, "HDD", True),
    "query.norm_histogram": ((torch.int64,), "QB", False),
    **{f"attention.{name}": (SUMS, "H", False) for name in ("peak_sum", "peak_square_sum")},
    **{f"sample.{role}": (CODES, "nHD", True) for role in ("key", "value")},
    **{f"sample.attention_{name}": (SAMPLES, "nH", False) for name in ("sum", "peak", "late")},
}
SINCE_4: Known = {
    **{f"sample.attention_{name}": (SAMPLES, "nH", False) for name in ("early", "later_square")},
    "sample.attention_slope": ((torch.bfloat16,), "nHD", True),
}
SINCE_6: Known = {f"{role}.fisher_outer": (SUMS, "HT", True) for role in ("key", "value")}
SINCE_7: Known = {f"sample.{role}_gradient": (SAMPLES, "nHD", True) for role in ("key", "value")}
UNTIL_7: Known = {f"sample.{role}_fisher": (SAMPLES, "nHD", False) for role in ("key", "value")}
ALL = KNOWN | SINCE_4 | SINCE_6 | SINCE_7 | UNTIL_7
Specs = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]
SEQUENCES, NLL = "sequences", "nll"
COLUMNS = ("sample.hash", "sample.sequence", "sample.position")


def read_info(path: Path, note: Any, kind: type[CalibrationInfo], versions: tuple[int, ...]) -> CalibrationInfo:
    """What the file at `path` says of itself, checked.

    Args:
        note: the file's metadata. kind: the class of the result. versions: those that can be read.

    Raises:
        CorruptFile: it is of another version, or a field is none, lies out of range or contradicts another.
    """
    info = note.get("info") if isinstance(note, dict) else None
    version = info.get("version") if isinstance(info, dict) else None
    if type(version) is not int or version not in versions:
        raise CorruptFile(f"{path}: calibration version is {shown(version)}, expected one of {versions}; {AGAIN}")
    try:
        found = kind.model_validate(info)
        _check_finite(found)
        _check_layers(found)
    except ValidationError as error:
        raise CorruptFile(f"{path}: info.{first_fault(error)}; {AGAIN}") from None
    except ValueError as error:
        raise CorruptFile(f"{path}: info.{error}; {AGAIN}") from None
    return found


def _check_finite(record: BaseModel, where: str = "") -> None:
    """ValueError for a count below 0 or beyond what JSON readers keep, or a number that is none."""
    for name, value in record:
        if isinstance(value, BaseModel):
            _check_finite(value, f"{where}{name}.")
        elif isinstance(value, float) and not abs(value) < torch.inf:
            raise ValueError(f"{where}{name} is {value}, expected a finite number")
        elif isinstance(value, int) and name == "seed":
            if not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{where}seed is {shown(value)}, expected 64 bits with a sign")
        elif isinstance(value, int) and not 0 <= value <= LARGEST:
            raise ValueError(f"{where}{name} is {shown(value)}, expected 0..2^53 - 1")


def _check_layers(info: CalibrationInfo) -> None:
    before = -1
    for place, layer in enumerate(info.layers):
        where = f"layers[{place}]"
        _check_finite(layer, f"{where}.")
        if not before < layer.index < info.model.num_hidden_layers:
            raise ValueError(
                f"{where}.index is {layer.index}, expected more than {before} and less than the model's "
                f"{info.model.num_hidden_layers} layers"
            )
        before = layer.index
        if not 0 < layer.kv_heads <= layer.query_heads or layer.query_heads % layer.kv_heads:
            raise ValueError(
                f"{where}.kv_heads is {layer.kv_heads}, expected a divisor of the {layer.query_heads} query heads"
            )
        if not 0 < layer.head_dim <= MOST_CHANNELS // layer.query_heads:
            raise ValueError(f"{where}.head_dim is {layer.head_dim}, expected 1..{MOST_CHANNELS // layer.query_heads}")
        partner, whole = layer.partner, range(layer.head_dim)
        if len(partner) != layer.head_dim or not all(p in whole and partner[p] == i for i, p in enumerate(partner)):
            raise ValueError(
                f"{where}.partner is {shown(partner)}, expected {layer.head_dim} channels, each its partner's"
            )


def check_specs(path: Path, info: CalibrationInfo, tensors: TensorFile) -> None:
    """CorruptFile, naming the tensor, unless the file's tensors have the types and shapes that `info` promises.

    Only the columns of the sample are read; `Sound` looks at the other values when they are.
    """
    try:
        kept = _check_columns(info, tensors)
        expected: Specs = dict.fromkeys(COLUMNS, ((torch.int64,), (kept,)))
        for layer in info.layers:
            expected |= _expected(info, layer, kept, tensors)
        if info.version >= 5 or SEQUENCES in tensors.specs:
            expected |= {SEQUENCES: ((torch.int64,), (info.sequences,)), **_exact(NLL, ())}
        for name in sorted(set(tensors.specs) - set(expected)):
            raise ValueError(f"tensor {shown(name)} is none that a calibration of these layers has")
        for name, (dtypes, shape) in expected.items():
            found = tensors.specs.get(name)
            # The histogram's bins are of one version's choosing.
            bins = found[1][-1:] if found is not None and shape[-1:] == (0,) else ()
            if found is None or found[0] not in dtypes or found[1] != (shape[:-1] + bins if bins else shape):
                kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                raise ValueError(f"{name} is {_kind(found)}, expected {kinds} {list(shape)}")
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}; {AGAIN}") from None


def _expected(info: CalibrationInfo, layer: LayerShape, kept: int, tensors: TensorFile) -> Specs:
    """Types and shapes of one layer's tensors, by name; sums in the form in which the file has them."""
    sizes = {"n": kept, "H": layer.kv_heads, "Q": layer.query_heads, "D": layer.head_dim, "B": 0}
    sizes["T"] = layer.head_dim * (layer.head_dim + 1) // 2
    found: Specs = {}
    for name, (dtypes, letters, _) in ALL.items():
        shape = tuple(sizes[letter] for letter in letters)
        full = f"layers.{layer.index}.{name}"
        if name in SINCE_4 and info.version < 4 and full not in tensors.specs:
            continue
        if (name in SINCE_6 and info.version < 6) or name in (SINCE_7 if info.version < 7 else UNTIL_7):
            continue
        exact = dtypes is SUMS and full not in tensors.specs
        found |= _exact(full, shape) if exact else {full: (dtypes, shape)}
    return found


def _exact(name: str, shape: tuple[int, ...]) -> Specs:
    """The two tensors that a sum is from version 5 on."""
    return {name + LIMBS: ((torch.int64,), (3, *shape)), name + TOP: ((torch.int16,), shape)}


def _check_columns(info: CalibrationInfo, tensors: TensorFile) -> int:
    """How many tokens were kept."""
    columns = []
    for name in COLUMNS:
        dtype, shape = spec = tensors.specs.get(name, (None, ()))
        if dtype != torch.int64 or len(shape) != 1:
            raise ValueError(f"{name} is {_kind(spec if dtype else None)}, expected int64 [tokens]")
        columns.append(found := tensors[name])
        if len(found) != len(columns[0]) or len(found) > info.keep_tokens:
            raise ValueError(f"{name} has {len(found)} tokens, expected as the others and at most {info.keep_tokens}")
        most = info.seq_len if name == "sample.position" else 1 << 63
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < most:
            raise ValueError(f"{name} spans {int(found.min())}..{int(found.max())}, expected 0..{most - 1}")
    return len(columns[0])


def _kind(spec: tuple[torch.dtype | None, tuple[int, ...]] | None) -> str:
    return "missing" if spec is None else f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"


class Sound(Mapping[str, Tensor]):
    """The tensors of the calibration file at `path`, each looked at when it is asked for.

    Raises:
        CorruptFile: when one is asked for that holds NaN, infinity, or numbers below 0 where there are none.
    """

    def __init__(self, tensors: Decoded, path: Path) -> None:
        self.tensors, self.path = tensors, path

    def __getitem__(self, name: str) -> Tensor:
        top = self.tensors.stored.get(name + TOP)
        if top is not None and bool(((top < LOWEST) | (top > HIGHEST)).any()):
            raise CorruptFile(f"{self.path}: {name}{TOP} leaves {LOWEST}..{HIGHEST}, the bins of a float64; {AGAIN}")
        found = self.tensors[name]
        _, _, negative = ALL.get(".".join(name.split(".")[2:]), ((), "", True))
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CorruptFile(f"{self.path}: {name} holds NaN or infinity; {AGAIN}")
        if not negative and bool((found < 0).any()):
            raise CorruptFile(f"{self.path}: {name} holds numbers below 0; {AGAIN}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
