import torch

from kvcalib.evaluation.baselines.ragged import Ragged, ranges, selected


def test_rows_of_a_batch_are_selected_token_by_token():
    """Entries are named (token, row, number); rows 2, 0, 2 of three."""
    counts = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0))
    names = [(t, b, n) for t in range(5) for b in range(3) for n in range(int(counts[b, t]))]
    ragged = Ragged()
    ragged.append({"name": torch.tensor(names[:4])})
    ragged.append({"name": torch.tensor(names[4:])})
    ragged.take(selected(counts, torch.tensor([2, 0, 2])))
    expected = [(t, b, n) for t in range(5) for b in (2, 0, 2) for n in range(int(counts[b, t]))]
    assert [tuple(row) for row in ragged.read()["name"].tolist()] == expected
    ragged.crop(3)
    assert [tuple(row) for row in ragged.read()["name"].tolist()] == expected[:3]
    assert len(ragged) == 3


def test_nothing_can_be_selected_of_nothing():
    ragged = Ragged()
    ragged.take(torch.tensor([], dtype=torch.long))
    assert len(ragged) == 0
    assert ranges(torch.tensor([4, 1]), torch.tensor([0, 0])).tolist() == []
