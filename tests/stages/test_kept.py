import json

import pytest

from kvcalib.errors import CorruptFile, FolderInUse, NonFiniteActivations
from kvcalib.launch import Launch
from kvcalib.stages.kept import Kept, beside

OF = {"samples": 4, "artifacts": ["a"], "sinks": None}


def started(path, of=OF, **settings):
    """One that has measured two of three batches, and the rows."""
    kept = Kept(Launch(), path, of, **settings)
    assert kept.due(3) == [0, 1, 2]
    for number in (0, 2):
        kept.keep(number, {"nll": 0.1 * number})
    return kept


def test_it_goes_on_and_goes_away(tmp_path, capsys):
    path = beside(tmp_path / "r.json")
    assert path.name == "r.json.partial.jsonl"
    started(path)
    with Kept(Launch(), path, OF) as again:
        assert again.due(3) == [1]
        assert "2 of 3 batches are there, 1 are left" in capsys.readouterr().err
        again.keep(1, {"nll": 7.0})
        assert again.rows() == {0: {"nll": 0.0}, 1: {"nll": 7.0}, 2: {"nll": 0.2}}
        assert again.done() == 3
    assert not path.exists()


def test_without_a_file_nothing_is_kept():
    kept = started(beside(None))
    assert kept.rows() == {0: {"nll": 0.0}, 2: {"nll": 0.2}}
    assert Kept(Launch(), None, OF).due(3) == [0, 1, 2]


def test_another_measurement_is_refused_or_discarded(tmp_path):
    path = tmp_path / "p"
    started(path)
    with pytest.raises(FolderInUse, match=r"p: holds another unfinished measurement: artifacts=\['a'\], now \['b'\]"):
        Kept(Launch(), path, OF | {"artifacts": ["b"]}).due(3)
    started(path, OF | {"artifacts": ["b"]}, discard=True)
    assert json.loads(path.read_text().splitlines()[0])["of"]["artifacts"] == ["b"]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(("error", "left"), [(NonFiniteActivations, False), (KeyboardInterrupt, True)])
def test_it_stays_where_going_on_helps(tmp_path, error, left):
    kept = started(tmp_path / "p")
    with pytest.raises(error), kept:
        raise error
    assert (tmp_path / "p").exists() == left


def test_rows_of_nobody_do_not_count(tmp_path):
    path = tmp_path / "p"
    path.write_text('{"batch": 0, "row": {"nll": 9}}\n')
    started(path)
    assert Kept(Launch(), path, OF).due(3) == [1]


def test_a_line_of_something_else_is_named(tmp_path):
    (tmp_path / "p").write_text(json.dumps({"of": OF}) + '\n{"x": 1}\n')
    with pytest.raises(CorruptFile, match="p: line 2: has neither"):
        Kept(Launch(), tmp_path / "p", OF).due(3)
