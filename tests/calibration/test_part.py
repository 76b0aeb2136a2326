"""A part's rows and sums come back as they went in, in any order and after any number of openings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcalib.calibration.part import Part, find_parts
from kvcalib.calibration.statistics import LayerShape
from kvcalib.calibration.sums import Decoded, Sums
from kvcalib.errors import CorruptFile, InputError, NonFiniteActivations

SHAPE = LayerShape(index=0, query_heads=2, kv_heads=1, head_dim=2, partner=[1, 0], scaling=0.5)
SAMPLED = {"layers.0.sample.key": (torch.bfloat16, (1, 3)), "layers.0.sample.attention_sum": (torch.float32, (1,)),
           "layers.0.sample.key_fisher": (torch.float32, (1, 3))}  # fmt: skip


def write(folder, counts, again=()):
    """Batches with `counts` rows each, numbered from the last down; the folder is opened anew before those in `again`.

    Returns:
        Each tensor's rows in the order in which they were written.
    """
    generator = torch.Generator().manual_seed(0)
    expected = {name: [torch.empty((0, *shape), dtype=dtype)] for name, (dtype, shape) in SAMPLED.items()}
    part, sums = Part(folder), Sums()
    for k, count in enumerate(counts):
        if k in again:
            part = Part(folder)
            # What was written of a batch that was not committed does not count.
            part.begin(3)
            part.put(next(iter(SAMPLED)), torch.ones(3, 1, 3, dtype=torch.bfloat16))
            part = Part(folder)
            sums = Sums(part.sums(), len(part.done))
        part.begin(count)
        for name, (dtype, shape) in SAMPLED.items():
            rows = torch.randn(count, *shape, generator=generator).to(dtype)
            part.put(name, rows)
            expected[name].append(rows)
        sums.add("nll", torch.tensor(0.1 * (k + 1), dtype=torch.float64))
        sums.add("layers.0.query.norm_histogram", torch.full((2, 4), k + 1))
        sums.close()
        part.commit(len(counts) - 1 - k, sums.tensors(), [SHAPE])
    return {name: torch.cat(rows) for name, rows in expected.items()}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sets(st.integers(1, 5)), st.randoms())
def test_rows_come_back_in_any_order(tmp_path_factory, counts, again, random):
    folder = tmp_path_factory.mktemp("part")
    expected = write(folder / "a", counts, again)
    (part,) = find_parts(folder)
    assert part.done == {len(counts) - 1 - k: count for k, count in enumerate(counts)}
    assert part.layers == [SHAPE]
    assert part.sample == SAMPLED
    index = np.array(random.choices(range(sum(counts)), k=50) if sum(counts) else [], dtype=np.int64)
    for name, rows in expected.items():
        assert torch.equal(part.gather(name, index), rows[torch.from_numpy(index)]), name


def test_sums_go_on_where_they_stopped(tmp_path):
    write(tmp_path / "a", [2, 3, 1])
    write(tmp_path / "b", [2, 3, 1], again=(1, 2))
    a, b = (Part(tmp_path / name).sums() for name in "ab")
    assert a.keys() == b.keys() == {"nll.limbs", "nll.top", "layers.0.query.norm_histogram"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert Decoded(a)["nll"].item() == pytest.approx(0.6, abs=1e-15)
    assert (a["layers.0.query.norm_histogram"] == 6).all()


def test_decoded_sums_hide_how_they_are_kept(tmp_path):
    found = Decoded(
        {"a.limbs": torch.tensor([0, 0, 5]), "a.top": torch.tensor(2, dtype=torch.int16), "b": torch.ones(1)}
    )
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert "a" in found
    assert "c" not in found
    assert found["a"].item() == 5.0
    with pytest.raises(KeyError):
        found["c"]


def test_contributions_that_are_not_finite_are_named():
    sums = Sums()
    sums.add("nll", torch.tensor(1.0, dtype=torch.float64))
    sums.add("layers.3.value.square_sum", torch.tensor([1.0, float("inf")], dtype=torch.float64))
    with pytest.raises(NonFiniteActivations, match=r"layers\.3\.value\.square_sum of a batch is NaN or infinite"):
        sums.close()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    part = Part(tmp_path / "file" / "part")
    part.begin(1)
    with pytest.raises(InputError, match="cannot be written"):
        part.put("layers.0.sample.key", torch.ones(1, 2))


def test_rows_that_are_cut_off_are_noticed(tmp_path):
    write(tmp_path / "a", [5])
    rows = tmp_path / "a" / "rows"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match=r"rows: ends after \d+ bytes, 1 more are expected"):
        Part(tmp_path / "a").gather("layers.0.sample.key_fisher", np.arange(5))
