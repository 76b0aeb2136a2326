"""Streamed safetensors files against the library's own reader and writer."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvcalib import streamed
from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import DTYPES, read_tensors, write_tensors
from kvcalib.streamed import TensorFile, stream_tensors

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def made(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def write(path, tensors, rows=1):
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    stream_tensors(path, specs, lambda name: tensors[name].reshape(-1).split(rows), {"a": 1})


@given(st.dictionaries(st.text("ab.é", min_size=1, max_size=5), st.tuples(st.sampled_from(list(DTYPES)), SHAPES)))
def test_same_tensors_as_the_library_reads(tmp_path_factory, specs):
    folder = tmp_path_factory.mktemp("streamed")
    tensors = {name: made(*spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    write(folder / "x", tensors)
    found = load_file(folder / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_tensors(folder / "x")[1] == {"a": 1}


def test_bytes_do_not_depend_on_the_pieces(tmp_path):
    tensors = {"b": torch.arange(12.0).view(3, 4), "a": torch.arange(3)}
    for rows in (1, 5, 100):
        write(tmp_path / str(rows), dict(reversed(tensors.items())) if rows == 5 else tensors, rows)
    assert len({(tmp_path / str(rows)).read_bytes() for rows in (1, 5, 100)}) == 1


def test_wrong_pieces_leave_the_old_file(tmp_path):
    write(tmp_path / "x", {"a": torch.zeros(3)})
    before = (tmp_path / "x").read_bytes()
    for pieces in ([torch.zeros(2)], [torch.zeros(4)], [torch.zeros(3, dtype=torch.float64)]):
        with pytest.raises(ValueError, match="a: "):
            stream_tensors(tmp_path / "x", {"a": (torch.float32, (3,))}, lambda name, pieces=pieces: pieces)
    assert (tmp_path / "x").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_lazy_file_reads_what_was_written(tmp_path):
    tensors = {"b": torch.arange(12.0).view(3, 4), "a": torch.arange(3)}
    write_tensors(tmp_path / "x", tensors, {"note": [1]})
    found = TensorFile(tmp_path / "x")
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert found.metadata == {"note": [1]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert "c" not in found
    with pytest.raises(KeyError):
        found["c"]


def test_lazy_file_refuses_damage(tmp_path):
    with pytest.raises(InputError, match="not found"):
        TensorFile(tmp_path / "none")
    (tmp_path / "x").write_bytes(json.dumps({}).encode())
    with pytest.raises(CorruptFile, match="not a readable safetensors file"):
        TensorFile(tmp_path / "x")


@given(st.lists(st.integers(0, 199), max_size=60), st.integers(0, 3))
def test_gathered_rows_are_the_rows(tmp_path_factory, index, dims):
    """In any order, more than once, and over many reads: one covers no more than a few rows here."""
    path = tmp_path_factory.mktemp("gather") / "x"
    tensor = torch.randn(200, *(3,) * dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    write_tensors(path, {"pad": torch.ones(3, dtype=torch.uint8), "x": tensor}, {})
    with pytest.MonkeyPatch.context() as patch:
        for gap, span in ((0, 100), (64, 1 << 20)):
            patch.setattr(streamed, "GAP", gap)
            patch.setattr(streamed, "SPAN", span)
            found = TensorFile(path).gather("x", np.array(index, dtype=np.int64))
            assert torch.equal(found, tensor[torch.tensor(index, dtype=torch.int64)])


def test_lazy_file_notices_that_it_was_cut_off_later(tmp_path):
    write_tensors(tmp_path / "x", {"x": torch.ones(100)}, {})
    found = TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 8)
    with pytest.raises(CorruptFile, match="8 more are expected"):
        found["x"]
