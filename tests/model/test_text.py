"""Sources of text to sequences of token ids."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvcalib.errors import InputError
from kvcalib.model.text import token_sequences

BOS = 1


class Letters:
    """A real tokenizer in miniature: a beginning, then one token per character, its code point."""

    def __call__(self, text, verbose=True):
        if not isinstance(text, str):
            raise ValueError("text input must be of type `str`")
        text.encode()  # as the tokenizers of transformers, which refuse lone surrogates
        return {"input_ids": [BOS, *map(ord, text)]}


def sequences(source, samples=2, seq_len=4, split="calibrate", seed=0):
    return token_sequences(str(source), Letters(), samples, seq_len, split, seed)


def ids(*texts: str) -> list[int]:
    return [i for text in texts for i in (BOS, *map(ord, text))]


def jsonl(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(folder, **columns):
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return folder / "data.parquet"


# Files


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\n\ntwo é\n", encoding="utf-8")
    found = sequences(path, samples=3)
    assert found.dtype == np.int64
    assert found.tolist() == np.reshape(ids("one\n\ntwo é\n"), (3, 4)).tolist()


def test_jsonl_mixes_text_and_ids(tmp_path):
    path = jsonl(tmp_path, {"text": "ab"}, "", {"input_ids": [7, 8, 9]}, {"text": "c", "other": 1})
    assert sequences(path).tolist() == [[BOS, ord("a"), ord("b"), 7], [8, 9, BOS, ord("c")]]


def test_parquet_text_column(tmp_path):
    path = parquet(tmp_path, text=["abc", None, "", "def"], other=[1, 2, 3, 4])
    assert sequences(path).ravel().tolist() == ids("abc", "def")


def test_first_sequences_are_taken_and_the_rest_is_left(tmp_path):
    path = jsonl(tmp_path, {"input_ids": list(range(100))})
    assert sequences(path, 2, 10).tolist() == [list(range(10)), list(range(10, 20))]
    assert sequences(path, 1, 100).shape == (1, 100)
    # What does not fill a sequence is dropped; fewer than asked for is no error.
    assert sequences(path, 50, 30).shape == (3, 30)


def test_lines_after_the_last_needed_are_not_read(tmp_path):
    path = jsonl(tmp_path, {"input_ids": list(range(8))}, "not json")
    assert sequences(path).shape == (2, 4)


def test_home_and_path_with_spaces(tmp_path, monkeypatch):
    (tmp_path / "my data.txt").write_text("abcdefgh")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sequences("~/my data.txt").shape == (2, 4)


# Files that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\t\n ", "no text"),
        ("empty.jsonl", b"", "no text"),
        ("blank.jsonl", b"\n \n", "no text"),
        ("ids.jsonl", b'{"input_ids": []}\n', "without any token"),
        ("short.txt", b"ab", "3 tokens, shorter than one sequence of 4"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8 text"),
        ("latin.jsonl", b'{"text": "caf\xe9 au lait"}\n', "not UTF-8 text"),
        ("bad.jsonl", b'{"input_ids": [1]}\n\n{"text": \n', r"bad\.jsonl:3: not valid JSON"),
        ("list.jsonl", b"[1, 2]\n", r"list\.jsonl:1: has list, expected a field 'text'"),
        ("field.jsonl", b'{"txt": "a"}\n', r"field\.jsonl:1: has \['txt'\], expected a field 'text'"),
        ("type.jsonl", b'{"text": 3}\n', r"type\.jsonl:1"),
        ("ids.jsonl", b'{"input_ids": [1, "2"]}\n', r"ids\.jsonl:1"),
        ("ids.jsonl", b'{"input_ids": [1, -2]}\n', r"ids\.jsonl:1"),
        ("huge.jsonl", b'{"input_ids": [99999999999999999999, 1, 2, 3]}\n', r"huge\.jsonl"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl:1"),
        ("surrogate.jsonl", b'{"text": "a\\ud800 bcdef"}\n', r"surrogate\.jsonl"),
        ("empty.parquet", b"", "not a readable parquet file"),
        ("bad.parquet", b"PAR1 nothing PAR1", "not a readable parquet file"),
        ("data.csv", b"abcdefgh", r"suffix is '\.csv', expected one of"),
        ("data", b"abcdefgh", "suffix is ''"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        sequences(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.txt", "missing.parquet", "./missing", "/missing/x", "~/missing"])
def test_missing_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        sequences(source)


def test_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="data"):
        sequences(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("abcdefgh")

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    # The superuser may read everything, so chmod would test nothing.
    monkeypatch.setattr(type(path), "read_text", deny)
    monkeypatch.setattr(type(path), "read_bytes", deny)
    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(InputError, match="Permission denied"):
        sequences(path)


def test_parquet_without_text_column(tmp_path):
    with pytest.raises(InputError, match=r"columns are \['body'\], expected one named 'text'"):
        sequences(parquet(tmp_path, body=["abc"]))


def test_parquet_text_of_another_type(tmp_path):
    with pytest.raises(InputError, match="text"):
        sequences(parquet(tmp_path, text=[1, 2, 3]))


def test_damaged_parquet_page(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["hello world " * 50] * 50}), path, compression="none", use_dictionary=False)
    body = bytearray(path.read_bytes())
    body[4:2000] = b"\xff" * 1996
    path.write_bytes(body)
    with pytest.raises(InputError, match=r"data\.parquet"):
        sequences(path)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 4), (-1, 4), (1, 1), (1, 0)])
def test_sizes_below_the_smallest(tmp_path, samples, seq_len):
    with pytest.raises(InputError, match=f"--samples is {samples} and --seq-len is {seq_len}, expected"):
        sequences("builtin", samples, seq_len)


# The Hub, behind a `datasets.load_dataset` of our own


@pytest.fixture
def hub(monkeypatch):
    """What a Hub would hold: `hub[name, config, split] = rows`; `hub.calls` are the arguments of each request."""
    import datasets

    class Hub(dict):
        calls: list = []

    held = Hub()
    held.calls = []

    def load_dataset(name, config=None, *, split, streaming, **kwargs):
        held.calls.append((name, config, split, kwargs))
        assert streaming, "a whole data set would be downloaded"
        if (name, config, split) not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore")
        return iter(held[name, config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def rows(*texts: str, column: str = "text"):
    return [{column: text} for text in texts]


WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@pytest.mark.parametrize(
    ("source", "split", "asked"),
    [
        ("owner/name", "calibrate", "train"),
        ("owner/name", "evaluate", "test"),
        ("owner/name:validation", "calibrate", "validation"),
        ("owner/name:validation", "evaluate", "validation"),
    ],
)
def test_hub_split(hub, source, split, asked):
    hub["owner/name", None, asked] = rows("abc", "def")
    assert sequences(source, split=split).ravel().tolist() == ids("abc", "def")


def test_hub_column(hub):
    hub["owner/name", None, "train"] = rows("abcdefg", column="body")
    assert sequences("owner/name:train:body").ravel().tolist() == ids("abcdefg")
    assert sequences("owner/name::body").ravel().tolist() == ids("abcdefg")
    with pytest.raises(InputError, match=r"columns are \['body'\], expected 'text'"):
        sequences("owner/name")


def test_hub_column_that_is_no_text(hub):
    hub["owner/name", None, "train"] = [{"text": 3}]
    with pytest.raises(InputError, match="owner/name"):
        sequences("owner/name")


def test_hub_dataset_that_breaks_off(hub):
    def broken():
        yield {"text": "a"}
        raise ConnectionError("the line went dead")

    hub["owner/name", None, "train"] = broken()
    with pytest.raises(InputError, match="the line went dead"):
        sequences("owner/name")


def test_hub_dataset_that_is_not_there(hub):
    with pytest.raises(InputError, match=r"'owner/none'.*doesn't exist on the Hub") as caught:
        sequences("owner/none")
    assert "\n" not in str(caught.value)


def test_wikitext2_crops_at_random_by_seed(hub):
    hub[(*WIKITEXT, "train")] = rows(*["abcdefghij" * 5] * 20)
    stream = ids("\n\n".join(["abcdefghij" * 5] * 20))
    found = sequences("wikitext2", 8, 16)
    assert found.shape == (8, 16)
    text = "".join(map(chr, stream))
    assert all("".join(map(chr, row)) in text for row in found)
    assert len({tuple(row) for row in found}) > 4
    assert sequences("wikitext2", 8, 16).tolist() == found.tolist()
    assert sequences("wikitext2", 8, 16, seed=1).tolist() != found.tolist()


def test_wikitext2_is_evaluated_in_order(hub):
    hub[(*WIKITEXT, "test")] = rows("abc", "def")
    assert sequences("wikitext2", 5, 4, "evaluate").ravel().tolist() == ids("abc\n\ndef")[:8]


@pytest.mark.parametrize("split", ["calibrate", "evaluate"])
@pytest.mark.parametrize("texts", [["ab"], []])
def test_wikitext2_shorter_than_one_sequence(hub, split, texts):
    hub[(*WIKITEXT, {"calibrate": "train", "evaluate": "test"}[split])] = rows(*texts)
    with pytest.raises(InputError, match="wikitext2"):
        sequences("wikitext2", 2, 8, split)


def test_c4_crops_documents_that_are_long_enough(hub):
    hub["allenai/c4", None, "train"] = rows("short", "abcdefghijklmnop", "no", "qrstuvwxyzabcdefgh", "0123456789012345")
    found = sequences("c4", 2, 10)
    assert [chr(max(row[1:])) > "a" for row in found] == [True, True]
    assert found.shape == (2, 10)
    assert hub.calls[0][3]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    sequences("c4", 2, 10, "evaluate")
    assert "validation" in hub.calls[1][3]["data_files"]["train"]


def test_c4_without_a_long_document(hub):
    hub["allenai/c4", None, "train"] = rows("short", "no")
    with pytest.raises(InputError, match=r"c4.*sequence of 10.*--seq-len"):
        sequences("c4", 2, 10)


@pytest.mark.parametrize("preset", ["wikitext2", "c4"])
def test_preset_without_a_network(hub, preset):
    with pytest.raises(InputError, match="can be reached"):
        sequences(preset)
