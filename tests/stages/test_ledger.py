import json

import pytest

from kvcalib.errors import CorruptFile, InputError
from kvcalib.stages.ledger import Ledger


def test_rows_come_back_to_the_last_bit(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "a.jsonl")
    rows = [{"x": 0.1 + 0.2, "y": [1e-300, 5e-324]}, {"x": -0.0, "text": "a\nb"}]
    ledger.append(rows[:1])
    ledger.append(rows[1:])
    assert list(ledger.rows()) == [(1, rows[0]), (2, rows[1])]
    assert str(list(ledger.rows())[1][1]["x"]) == "-0.0"


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path, cut):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append([{"number": 1}])
    ledger.path.write_bytes(ledger.path.read_bytes() + json.dumps({"number": 2000}).encode()[:cut])
    assert list(ledger.rows()) == [(1, {"number": 1})]
    ledger.append([{"number": 3}])
    assert ledger.path.read_text() == '{"number": 1}\n{"number": 3}\n'


def test_a_last_line_that_lacks_its_newline_counts(tmp_path):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.path.write_text('{"number": 1}\n{"number": 2}')
    assert [row["number"] for _, row in ledger.rows()] == [1, 2]
    ledger.append([{"number": 3}])
    assert [row["number"] for _, row in ledger.rows()] == [1, 2, 3]


@pytest.mark.parametrize(("line", "said"), [("{", "not valid JSON"), ("[1]", "is list, expected an object")])
def test_a_damaged_line_is_named_with_the_remedy(tmp_path, line, said):
    ledger = Ledger(tmp_path / "a.jsonl", "drop it")
    ledger.path.write_text(f'{{"number": 1}}\n\n{line}\n{{"number": 2}}\n')
    with pytest.raises(CorruptFile, match=rf"a\.jsonl: line 3: {said}.*; drop it"):
        list(ledger.rows())


def test_no_file_is_no_rows_and_a_folder_is_an_error(tmp_path):
    assert list(Ledger(tmp_path / "none").rows()) == []
    with pytest.raises(InputError, match="cannot be read"):
        list(Ledger(tmp_path).rows())
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError, match=r"a\.jsonl: (cannot be written|not writable)"):
        Ledger(tmp_path / "a.jsonl").append([{}])
