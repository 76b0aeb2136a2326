"""A few hundred cases of the fuzzer, what it would find if it were there, and layouts that hypothesis makes up."""

from __future__ import annotations

import json
import os
import signal
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import kvcalib
from kvcalib.quant.packing import PLANES, Layout
from tests.hostile import fuzz, mutations
from tests.hostile.builders import TENSORS, put, write
from tests.hostile.oracle import Forbidden, check_layout, fault

COUNT = 300


@pytest.fixture(scope="module")
def runner():
    return fuzz.Runner(seed=11)


def test_each_case_is_refused_by_name_or_valid(runner, tmp_path):
    found = []
    while len(found) < COUNT:
        found += fuzz.in_child(runner, tmp_path, len(found), min(COUNT, len(found) + 100))
    wrong = [f"case {one.number} ({one.kind}): {one.outcome} {one.message}" for one in found if "WRONG" in one.outcome]
    assert not wrong, wrong[:5]
    assert [one.number for one in found] == list(range(COUNT))
    made = fuzz.summary(found, COUNT, 11, 1.0)
    assert json.loads(json.dumps(made))["wrong"] == []
    # Neither does everything load nor is everything refused, and what loads has been run.
    assert made["outcomes"]["loaded"] > 20 < made["outcomes"]["refused: CorruptFile"]
    assert made["attached_and_run"] > 10
    assert len(made["reasons"]) > 20
    assert list(tmp_path.iterdir()) == []


def test_same_number_same_case(tmp_path):
    for number in (3, 4):
        made = [mutations.make(tmp_path / f"{number}{i}", 7, number) for i in range(2)]
        assert made[0] == made[1]
    assert len({mutations.make(tmp_path / f"k{i}", 7, i).kind for i in range(60)}) > 6


# What the fuzzer must notice: a reader that does worse


def load_and(do):
    real = kvcalib.load

    def load(folder):
        do(folder)
        return real(folder)

    return load


def crash(folder):
    os.kill(os.getpid(), signal.SIGSEGV)


def write_beside(folder):
    (folder.parent / "mine").write_text("")


def read_elsewhere(folder):
    with open("/etc/passwd") as file:
        file.read()


def trip(folder):
    raise IndexError("boundary")


def wait(folder):
    time.sleep(1.05)


def allocate(folder):
    torch.empty(fuzz.ROOM * 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("reader", "outcome"),
    [
        (load_and(crash), "WRONG: the interpreter ended with SIGSEGV"),
        (load_and(write_beside), "WRONG: the folder or its surroundings changed"),
        (load_and(read_elsewhere), "WRONG: it did more than read its files"),
        (load_and(trip), "WRONG: IndexError"),
        (load_and(wait), "WRONG: takes over a second"),
        (load_and(allocate), "WRONG: RuntimeError"),
        (lambda folder: None, "WRONG: loads"),
    ],
    ids=["crash", "write", "read", "trip", "wait", "allocate", "load"],
)
def test_a_worse_reader_is_found_out(runner, tmp_path, monkeypatch, reader, outcome):
    monkeypatch.setattr(kvcalib, "load", reader)
    monkeypatch.setattr(fuzz.Runner, "run", lambda self, artifact: True)
    number = forbidden(runner.seed, tmp_path / "cases")
    (found,) = fuzz.in_child(runner, tmp_path, number, number + 1)
    assert found.outcome.startswith(outcome), found


def forbidden(seed: int, room) -> int:
    """A case that the specification forbids and whose hashes are right."""
    for number in range(1000):
        folder = room / str(number)
        if mutations.make(folder, seed, number).kind == "tensors" and fault(folder) is not None:
            return number
    raise AssertionError("no such case")


# The oracle


def test_oracle_accepts_the_truth_and_real_artifacts(tmp_path):
    assert fault(write(tmp_path / "a")) is None
    from tests.artifact.test_store import write as write_example

    assert fault(write_example(tmp_path / "b")) is None


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"body": put("layers", 0, "key", "outliers", 32)}, "outliers"),
        ({"text": lambda text: text + b" "}, "encoding"),
        ({"after": lambda folder: (folder / TENSORS).unlink()}, "missing"),
        ({"header": lambda header: header.update(x=1)}, "names of tensors"),
    ],
)
def test_oracle_refuses(tmp_path, lie, found):
    assert found in (fault(write(tmp_path / "a", **lie)) or "")


# Layouts


@st.composite
def layouts(draw):
    """Tables of a valid layout of a few channels, and then up to three numbers of them changed."""
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    widths = np.array(draw(st.lists(st.integers(0, 8), min_size=heads * dim, max_size=heads * dim)), np.uint8)
    built = Layout.build(torch.from_numpy(widths.reshape(heads, dim)), draw(st.sampled_from([None, "head", "row"])))
    word, shift = built.word.numpy().copy(), built.shift.numpy().copy()
    for _ in range(draw(st.integers(0, 3))):
        place = tuple(draw(st.integers(0, n - 1)) for n in word.shape)
        if draw(st.booleans()):
            word[place] = draw(st.integers(-2, built.words + 1))
        else:
            shift[place] = draw(st.sampled_from([0, 1, 2, 4, 8, 16, 28, 29, 30, 31, 32, 255]))
    words = built.words + draw(st.sampled_from([0, 0, 0, 1, -1]))
    return built.widths.numpy(), word, shift, max(0, words), draw(st.sampled_from([built.segment, "head", "row"]))


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_layout_is_refused_where_the_specification_refuses_it(made):
    widths, word, shift, words, segment = made
    tables = (torch.from_numpy(t) for t in (widths, word, shift))
    try:
        check_layout(*made)
        allowed = True
    except Forbidden:
        allowed = False
    try:
        Layout(*tables, words, segment).check()
        taken = True
    except ValueError:
        taken = False
    assert taken == allowed


def test_planes_of_the_oracle_are_the_formats():
    from tests.hostile.oracle import PLANES as OWN

    assert {width: tuple(sizes) for width, sizes in OWN.items()} == PLANES
