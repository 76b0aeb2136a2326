"""Files that are written whole or not at all."""

import errno
import gc
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvcalib.errors import CorruptFile, InputError
from kvcalib.files import (
    DTYPES,
    encode_tensors,
    hash_bytes,
    hash_file,
    hash_tensor,
    read_json,
    read_tensors,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
    write_tensors,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.int16).reshape(2, 3),
    "a": torch.tensor([1.5, float("nan"), -0.0]),
    "empty": torch.empty(0, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def test_write_replaces_whole_and_makes_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_bytes(path, b"first, and longer")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full, nothing was changed"),
        (errno.EDQUOT, "the disk is full, nothing was changed"),
        (errno.EROFS, "not writable"),
        (errno.EFBIG, "too large for this disk or for the limit of this process"),
        (errno.EIO, "cannot be written, the disk reports an error"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_the_file_and_leaves_nothing(tmp_path, monkeypatch, number, message, call):
    path = tmp_path / "file"
    write_bytes(path, b"before")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=message) as caught:
        write_bytes(path, b"after")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"after")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "below", b"x")
    assert (tmp_path / "file").read_text() == "mine"


def test_json_round_trip_and_one_way_to_write_it(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [0.1, None, "é"]})
    write_json(tmp_path / "b", {"a": [0.1, None, "é"], "b": 1})
    assert read_json(tmp_path / "a") == {"b": 1, "a": [0.1, None, "é"]}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_bad_json_is_a_corrupt_file(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(CorruptFile, match="not valid JSON"):
        read_json(tmp_path / "a")
    with pytest.raises(InputError, match="not found"):
        read_json(tmp_path / "missing")


def test_tensors_round_trip(tmp_path):
    write_bytes(tmp_path / "t", encode_tensors(TENSORS, {"z": 1, "a": "é"}))
    found, note = read_tensors(tmp_path / "t")
    assert note == {"z": 1, "a": "é"}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert hash_tensor(found[name]) == hash_tensor(tensor)


def test_order_and_layout_do_not_change_the_bytes():
    turned = {name: TENSORS[name] for name in reversed(TENSORS)}
    turned["b"] = TENSORS["b"].T.contiguous().T
    assert encode_tensors(turned, {"a": 1, "b": 2}) == encode_tensors(TENSORS, {"b": 2, "a": 1})


def test_truncated_tensors_are_found_at_every_length(tmp_path):
    path = tmp_path / "t.safetensors"
    body = encode_tensors(TENSORS, {"a": 1})
    for length in range(len(body)):
        path.write_bytes(body[:length])
        with pytest.raises(CorruptFile, match=r"t\.safetensors"):
            read_tensors(path)


def test_metadata_of_others(tmp_path):
    path = tmp_path / "t"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CorruptFile, match="no key 'kvcalib'"):
        read_tensors(path)
    save_file({"a": torch.ones(2)}, path, metadata={"kvcalib": "{not json"})
    with pytest.raises(CorruptFile):
        read_tensors(path)
    with pytest.raises(InputError, match="not found"):
        read_tensors(tmp_path / "missing")


def test_hashes(tmp_path):
    # FIPS 180-2, "abc"
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_bytes(b"abc") == hash_file(tmp_path / "a") == known
    assert hash_tensor(torch.tensor([97, 98, 99], dtype=torch.uint8)) == known
    assert hash_tensor(torch.empty(0)) == hash_bytes(b"")
    assert hash_tensor(TENSORS["b"].T) == hash_bytes(TENSORS["b"].numpy().T.tobytes())


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", {"a": float("nan")})
    assert json.dumps(float("nan")) == "NaN"
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    path = tmp_path / "a"
    (tmp_path / ".a.1234.tmp").write_bytes(b"half")  # as older versions named them, by process
    (tmp_path / ".a.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".a.b.0123abcd.tmp").write_bytes(b"of another file")
    (tmp_path / ".a.mine.tmp").write_bytes(b"no name of ours")
    with replacing(path) as living:
        living.write_bytes(b"under way")
        write_bytes(path, b"whole")
        assert living.exists()
    assert path.read_bytes() == b"under way"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.b.0123abcd.tmp", ".a.mine.tmp", "a"]
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.mine.tmp", "a"]


def test_many_names_leave_no_patterns_behind(tmp_path):
    """A server saves caches under names of their own."""

    def patterns():
        return sum(type(x) is re.Pattern for x in gc.get_objects())

    write_bytes(tmp_path / "first", b"")
    before = patterns()
    for number in range(30):
        write_bytes(tmp_path / f"cache.{number} (of 30)+", b"")
    assert patterns() == before


def test_device_is_written_to_and_not_replaced(tmp_path):
    with pytest.raises(InputError, match=r"/dev/full: the disk is full"):
        write_bytes(Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()
    assert [p.name for p in Path("/dev").iterdir() if ".tmp" in p.name] == []
    os.mkfifo(tmp_path / "pipe")
    read = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1])
    assert os.read(read, 100) == b"[\n 1\n]\n"
    os.close(read)


def test_tensors_written_piece_by_piece_are_the_librarys_bytes(tmp_path):
    every = {f"{n % 3} {dtype}": torch.ones(n, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    tensors = TENSORS | every | {'é\n"': torch.tensor(2.5)}
    write_tensors(tmp_path / "t", tensors, {"z": [1, None], "a": "é"})
    assert (tmp_path / "t").read_bytes() == encode_tensors(tensors, {"z": [1, None], "a": "é"})


def test_file_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    """The content first, then its name: else a crash of the machine can leave an empty file under it."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        seen.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def replaced(source, target):
        seen.append(f"to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_bytes(tmp_path / "a", b"x")
    monkeypatch.undo()
    assert [p.name if isinstance(p, Path) else p for p in seen][1:] == ["to a", tmp_path.name]
    assert seen[0].name.endswith(".tmp")
