"""The calibration file: what is written is read, by layer, and files of earlier versions too."""

import pytest
import torch

from kvcalib.calibration.statistics import Calibration, from_lower_triangle, lower_triangle
from kvcalib.errors import CorruptFile
from kvcalib.files import write_tensors
from tests.tiny import as_of, calibrate


@pytest.fixture
def record(llama):
    return calibrate(llama)


def test_the_same_record_gives_the_same_bytes_and_comes_back(record, tmp_path):
    record.save(tmp_path / "a")
    found, _ = Calibration.load(tmp_path / "a")
    assert found.info == record.info
    assert set(found.tensors) == set(record.tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in record.tensors.items())
    found.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_layer_is_its_tensors_without_the_prefix(record, tmp_path):
    record.save(tmp_path / "a")
    layer = Calibration.load(tmp_path / "a")[0].layer(1)
    names = {name.removeprefix("layers.1.") for name in record.tensors if name.startswith("layers.1.")}
    assert set(layer) == names
    assert len(layer) == len(names)
    assert "key.sum" in layer
    assert "key.sum.limbs" not in names
    assert "sample.hash" not in layer
    assert torch.equal(layer["sample.key"], record.tensors["layers.1.sample.key"])
    assert layer["key.sum"].dtype == torch.float64
    # In the sample are all tokens.
    few = layer["sample.value"].double().square().sum(0)
    assert (layer["value.square_sum"] >= few * (1 - 1e-6)).all()


def test_sums_in_the_file_are_as_the_page_says(record):
    """`2^(40 (top - 2)) (limbs[0] 2^80 + limbs[1] 2^40 + limbs[2])`, in Python's own integers."""
    limbs, top = (record.stored[f"layers.0.key.sum.{end}"] for end in ("limbs", "top"))
    for head, channel in ((0, 0), (1, 7)):
        a, b, c = (int(x) for x in limbs[:, head, channel])
        whole, exponent = a * 2**80 + b * 2**40 + c, 40 * (int(top[head, channel]) - 2)
        expected = whole * 2**exponent if exponent >= 0 else whole / 2**-exponent
        assert record.tensors["layers.0.key.sum"][head, channel].item() == expected
    assert record.tensors["nll"].item() == record.info.nll_sum


def test_files_of_version_4_are_read(record, tmp_path):
    """As written before sums were exact: float64 sums, no ids of sequences, no count of batches."""
    info, tensors = as_of(4, record)
    write_tensors(tmp_path / "old", tensors, {"info": info, "extra": None})
    found, _ = Calibration.load(tmp_path / "old")
    assert found.info.version == 4
    assert found.info.nll == record.info.nll
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(t, record.tensors[n]) for n, t in found.tensors.items())
    assert found.curvature(0, "key") is None


def test_the_curvature_is_symmetric_and_has_the_fisher_on_its_diagonal(record):
    for role in ("key", "value"):
        curvature = record.curvature(1, role)
        assert torch.equal(curvature, curvature.transpose(1, 2))
        fisher = record.layer(1)[f"{role}.fisher_sum"] / record.info.tokens
        assert torch.allclose(curvature.diagonal(dim1=1, dim2=2), fisher, rtol=1e-5)


def test_half_a_matrix_is_all_of_it():
    square = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(0))
    square = square + square.transpose(1, 2)
    assert torch.equal(from_lower_triangle(lower_triangle(square)), square)


def test_unknown_versions_are_refused(record, tmp_path):
    note = {"info": record.info.model_dump(mode="json") | {"version": 8}}
    write_tensors(tmp_path / "new", dict(record.stored), note)
    with pytest.raises(CorruptFile, match=r"version is 8, expected one of \(2, 3, 4, 5, 6, 7\)"):
        Calibration.load(tmp_path / "new")
