"""Lines that survive what happens to processes, and claims that end with them."""

import json
import multiprocessing
import os
import signal

import pytest

from kvcalib.errors import CorruptFile, FolderInUse
from kvcalib.stages.sweep_store import Measures, Record, Store, Subject, SweepDir, exclusive

MEASURES = Measures(
    effective_bits=3.0, cache_bytes=30.0, fp16_cache_bytes=160.0, tokens=5, nll=2.0, fp16_nll=1.9, delta_nll=0.1,
    kld=0.05, top1_agreement=0.9,
)  # fmt: skip


def record(key, status="done", name=""):
    return Record(
        key=key, name=name, status=status, settings={"a": 1}, subject=Subject(weights_sha256="w", text_sha256="t",
        dtype="float32"), measures=MEASURES if status == "done" else None, seconds={}, runs={}, memory=1.0, machine="m",
        device="cpu", created="2026-11-23",
    )  # fmt: skip


def test_the_last_line_of_a_key_counts(tmp_path):
    store = Store(tmp_path / "deep" / "r.jsonl")
    assert store.read() == {}
    for made in (record("a", "failed"), record("b"), record("a")):
        store.append(made)
    assert {key: r.status for key, r in store.read().items()} == {"b": "done", "a": "done"}
    assert len(store.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path, cut):
    store = Store(tmp_path / "r.jsonl")
    store.append(record("a"))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + record("b").model_dump_json().encode()[:cut])
    assert set(store.read()) == {"a"}
    store.append(record("c"))
    assert set(store.read()) == {"a", "c"}
    assert [json.loads(line)["key"] for line in store.path.read_text().splitlines()] == ["a", "c"]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    store.append(record("a"))
    store.path.write_bytes(store.path.read_bytes().rstrip(b"\n"))
    assert set(store.read()) == {"a"}
    store.append(record("b"))
    assert set(store.read()) == {"a", "b"}


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    store.append(record("a"))
    store.path.write_bytes(b'{"key": 3}\n' + store.path.read_bytes())
    with pytest.raises(CorruptFile, match=r"r\.jsonl: line 1: key: .*delete the line"):
        store.read()


def _append(path, name, count):
    for number in range(count):
        Store(path).append(record(f"{name}{number}", name="x" * 5000))


def test_lines_of_many_writers_stay_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path / "r.jsonl", name, 20)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(Store(tmp_path / "r.jsonl").read()) == {f"{name}{number}" for name in "abc" for number in range(20)}


def _hold(path, ready):
    with exclusive(path):
        ready.set()
        signal.pause()


def test_a_claim_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "claim", ready))
    holder.start()
    assert ready.wait(30)
    with exclusive(tmp_path / "claim", wait=False) as mine:
        assert not mine
    os.kill(holder.pid, signal.SIGKILL)
    with exclusive(tmp_path / "claim") as mine:
        assert mine
    holder.join()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUse, match="holds no sweep of kvcalib"):
        SweepDir(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    SweepDir(tmp_path / "new")
    SweepDir(tmp_path / "new")
    (tmp_path / "new" / "sweep.json").write_text('{"format": "kvcalib-sweep", "format_version": 9}')
    with pytest.raises(FolderInUse, match="'format_version': 9"):
        SweepDir(tmp_path / "new")
