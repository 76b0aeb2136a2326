"""What an artifact's manifest and tensors must satisfy beyond types and hashes (docs/artifact.md, section 9).

Compiled code reads a row of words by the layout's tables, and looks codes up in the codebook: an artifact that passes
here cannot lead it outside of either. Sizes are compared before any tensor is read.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kvcalib.artifact.manifest import LayerSpec, Manifest, TensorRecord, TensorSpec
from kvcalib.quant.packing import MAX_BITS, MAX_PLANES, Layout, check_widths
from kvcalib.untrusted import shown

DTYPES = {"widths": "uint8", "codebook": "float32", "word": "int16", "shift": "uint8", "weight": "float32"}
FEEDBACK, LARGEST_FEEDBACK = "feedback", 65504.0
"""The tensor of a role with error feedback. The targets that it makes stay far from float32's limits."""
BASIS, SKEW = "basis", 1e-4
"""The tensor of values in a basis of their own, and how far its products of axes may be from 0 and 1."""
ROLES = ("key", "value")
MOST_WORDS = MOST_ELEMENTS = 1 << 15
"""Words of a row and elements of a group of outliers: what an int16 can name."""
LARGEST_CENTROID = 65504.0
"""float16's largest number. What is decoded then stays far from float32's limits."""


def check_manifest(manifest: Manifest) -> None:
    """ValueError, naming the field, unless layers are in order and `tensors` lists what they need, shapes that fit."""
    expected = {
        f"layers.{layer.index}.{role}.{name}"
        for layer in manifest.layers
        for role in ROLES
        for name in (*DTYPES, *_optional(role_of(layer, role)))
    }
    for name in sorted(expected ^ set(manifest.tensors)):
        raise ValueError(f"tensors: {shown(name)} is " + ("missing" if name in expected else "none that a layer has"))
    before = -1
    for place, layer in enumerate(manifest.layers):
        if not before < layer.index < manifest.model.num_hidden_layers:
            raise ValueError(
                f"layers[{place}].index is {layer.index}, expected more than {before} and less than the "
                f"{manifest.model.num_hidden_layers} layers of the model"
            )
        before = layer.index
        for role in ROLES:
            _check_spec(f"layers[{place}].{role}", role_of(layer, role))
            _check_records(f"layers.{layer.index}.{role}", role_of(layer, role), manifest.tensors)


def role_of(layer: LayerSpec, role: str) -> TensorSpec:
    """A layer's keys or values."""
    return layer.key if role == "key" else layer.value


def _optional(spec: TensorSpec) -> list[str]:
    """The tensors that keys or values have beside `DTYPES`."""
    return [name for name, there in ((FEEDBACK, spec.feedback), (BASIS, spec.basis)) if there]


def _check_spec(where: str, spec: TensorSpec) -> None:
    elements = spec.head_dim if spec.scope == "head" else spec.kv_heads * spec.head_dim
    if elements > MOST_ELEMENTS:
        raise ValueError(f"{where}: a group has {elements} elements, expected at most {MOST_ELEMENTS}")
    if spec.outliers >= elements:
        raise ValueError(f"{where}.outliers is {spec.outliers}, expected less than the {elements} elements of a group")
    if spec.feedback and spec.head_dim < 2:
        raise ValueError(f"{where}.feedback is true, expected false with one channel a head: there is no other one")
    if spec.words > min(MOST_WORDS, MAX_PLANES * spec.kv_heads * spec.head_dim):
        raise ValueError(f"{where}.words is {spec.words}, expected at most {MOST_WORDS}, and a field in each")


def _check_records(where: str, spec: TensorSpec, records: dict[str, TensorRecord]) -> None:
    found = {name: records[f"{where}.{name}"] for name in DTYPES}
    for name, record in found.items():
        if record.dtype != DTYPES[name]:
            raise ValueError(f"tensors: {where}.{name}.dtype is {record.dtype!r}, expected {DTYPES[name]!r}")
    plane, shape = [spec.kv_heads, spec.head_dim], found["word"].shape
    planes = shape[0] if shape and 1 <= shape[0] <= MAX_PLANES else MAX_PLANES
    tables = [planes, *plane]
    for name, expected in (("widths", plane), ("weight", plane), ("word", tables), ("shift", tables)):
        if found[name].shape != expected:
            raise ValueError(f"tensors: {where}.{name}.shape is {shown(found[name].shape)}, expected {expected}")
    triangle = [spec.kv_heads, spec.head_dim * (spec.head_dim - 1) // 2]
    optional = {FEEDBACK: triangle, BASIS: [*plane, spec.head_dim]}
    for name in _optional(spec):
        record = records[f"{where}.{name}"]
        if record.dtype != "float32" or record.shape != optional[name]:
            raise ValueError(
                f"tensors: {where}.{name} is {record.dtype} {shown(record.shape)}, expected float32 {optional[name]}"
            )
    channels, shape = math.prod(plane), found["codebook"].shape
    if len(shape) != 1 or not channels <= shape[0] <= channels << MAX_BITS:
        raise ValueError(f"tensors: {where}.codebook.shape is {shown(shape)}, expected one number from {channels} on")


def check_tensors(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """ValueError, naming layer and tensor, unless widths, tables, codebooks and weights fit together.

    Args:
        tensors: with the dtypes and shapes that `manifest`, which `check_manifest` has passed, says.
    """
    for place, layer in enumerate(manifest.layers):
        for role in ROLES:
            spec, where = role_of(layer, role), f"layers[{place}].{role}"
            named = {name: tensors[f"layers.{layer.index}.{role}.{name}"] for name in DTYPES}
            try:
                _check_codebook(named["codebook"].numpy(), check_widths(named["widths"]))
                Layout(named["widths"], named["word"], named["shift"], spec.words, spec.segment).check()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not bool((torch.isfinite(named["weight"]) & (named["weight"] >= 0)).all()):
                raise ValueError(f"{where}: weight holds numbers that are not finite or below 0")
            if spec.feedback and not bool(
                (tensors[f"layers.{layer.index}.{role}.{FEEDBACK}"].abs() <= LARGEST_FEEDBACK).all()
            ):
                raise ValueError(f"{where}: feedback holds numbers that are not finite or beyond {LARGEST_FEEDBACK:g}")
            if spec.basis:
                try:
                    _check_basis(tensors[f"layers.{layer.index}.{role}.{BASIS}"])
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None


def _check_basis(matrix: Tensor) -> None:
    """ValueError unless every head's axes are of length 1 and at right angles: no value can then grow by turning it."""
    products = matrix.double().transpose(1, 2) @ matrix.double()
    skew = (products - torch.eye(matrix.shape[1], dtype=torch.float64)).abs().amax((1, 2))
    # NaN fails the comparison, too.
    wrong = ~(skew <= SKEW)
    if bool(wrong.any()):
        head = int(wrong.int().argmax())
        raise ValueError(
            f"basis of head {head} is not orthogonal: products of its axes are up to {float(skew[head]):.2g} off, "
            f"expected at most {SKEW:g}"
        )


def _check_codebook(ragged: np.ndarray, widths: Tensor) -> None:
    sizes = 1 << widths.flatten().numpy().astype(np.int32)
    if len(ragged) != sizes.sum():
        raise ValueError(f"codebook has {len(ragged)} centroids, expected {sizes.sum()} for its widths")
    # NaN fails the comparison, too.
    wrong = ~(np.abs(ragged) <= LARGEST_CENTROID)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"codebook[{place}] is {ragged[place]}, expected finite and at most {LARGEST_CENTROID:g}")
    falls = ragged[1:] < ragged[:-1]
    falls[sizes.cumsum()[:-1] - 1] = False
    if falls.any():
        raise ValueError(f"codebook[{int(falls.argmax()) + 1}] is less than the one before: it does not ascend")
