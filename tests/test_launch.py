"""Three processes that meet: every check runs inside them, and one of them is killed at the end."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from kvcalib import launch
from kvcalib.errors import FolderInUse, InputError, ProcessLost
from kvcalib.launch import Launch

SIZE = 3


def _talk(rank: int, port: int, folder: str, answer) -> None:
    """What one process of the launch finds out, sent back as one dictionary."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    common, own = Path(folder), Path(folder) / f"own{rank}"
    own.mkdir()
    here = launch.here()
    found = {
        "place": (here.rank, here.size, here.local_rank, here.local_size, here.first),
        "mine": here.mine(range(8)),
        "gather": here.gather({"rank": rank, "text": "x" * rank}),
        "same": here.same(f"from {rank}"),
        "shares": (here.shares(common), here.shares(own)),
        "disks": (here.disks(common), here.disks(own)),
        "unite": here.unite({"all": 0, str(rank): rank, "some": rank} if rank else {"all": 0}),
    }
    names = ("run.json", "stages/a.json", "gone")
    if rank == 0:
        (own / "stages").mkdir()
        (own / "run.json").write_text("0"), (own / "stages" / "a.json").write_text("a")
    else:
        (own / "run.json").write_text(str(rank)), (own / "gone").write_text("old")
    here.supply(own, names)
    found["supplied"] = [(own / name).read_text() if (own / name).exists() else None for name in names]
    order = common / "order"

    def make() -> str:
        (order / "made").mkdir(parents=True) if rank == 0 else None
        return str((order / "made").exists())

    found["in_turn"] = here.in_turn("test", make)
    try:
        with here.step("reading"):
            if rank == 2:
                raise FolderInUse("holds something else")
    except FolderInUse as error:
        found["error"] = (str(error), error.shared)
    launch.CHUNK = 1000
    (own / "source").write_bytes(bytes(range(256)) * 10 + bytes([rank]))
    here.fetch(own / "source", 1, own / "target")
    found["fetched"] = (own / "target").read_bytes() if (own / "target").exists() else None
    try:
        here.fetch(own / "source", 2, own / "source" / "is a file")
    except InputError as error:
        found["unwritable"] = str(error)
    answer.send(found)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        here.gather(None)
        answer.send("no error")
    except ProcessLost as error:
        answer.send(str(error))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("launch")
    started = []
    for rank in range(SIZE):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_talk, args=(rank, port, str(folder), theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    found = [ours.recv() for _, ours in started]
    after = [ours.recv() for process, ours in started if process is not started[1][0]]
    for process, _ in started:
        process.join()
    return found, after


def test_each_knows_its_place_and_share(told):
    assert [f["place"] for f in told[0]] == [(r, SIZE, r, SIZE, r == 0) for r in range(SIZE)]
    assert [f["mine"] for f in told[0]] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_gather_and_same(told):
    everything = [{"rank": r, "text": "x" * r} for r in range(SIZE)]
    assert all(f["gather"] == everything and f["same"] == "from 0" for f in told[0])


def test_shared_and_own_folders_are_told_apart(told):
    assert all(f["shares"] == (True, False) for f in told[0])


def test_disks_are_known_by_their_lowest_process(told):
    assert all(f["disks"] == ([0] * SIZE, list(range(SIZE))) for f in told[0])


def test_what_any_process_knows_all_know(told):
    assert all(f["unite"] == {"all": 0, "1": 1, "2": 2, "some": 1} for f in told[0])


def test_other_disks_get_the_firsts_files(told):
    assert all(f["supplied"] == ["0", "a", None] for f in told[0])


def test_first_makes_before_the_others_look(told):
    assert all(f["in_turn"] == "True" for f in told[0])


def test_error_of_one_is_raised_in_all(told):
    said = [f["error"] for f in told[0]]
    assert said[2] == ("holds something else", True)
    assert said[0] == said[1] == ("reading: process 2 of 3: holds something else", True)


def test_files_travel_in_chunks(told):
    assert [f["fetched"] for f in told[0]] == [bytes(range(256)) * 10 + bytes([1]), None, None]


def test_unwritable_target_is_everybodys_error(told):
    assert all("is a file" in f["unwritable"] for f in told[0])


def test_lost_process_is_noticed(told):
    assert len(told[1]) == 2
    assert all("another process of this launch has ended" in said for said in told[1])


def test_one_process_needs_nobody(tmp_path):
    alone = Launch()
    assert alone.mine([1, 2]) == [1, 2]
    assert alone.gather({"a": 1}) == [{"a": 1}]
    assert alone.shares(tmp_path)
    with pytest.raises(InputError, match="as it is"), alone.step("x"):
        raise InputError("as it is")


def test_world_size_that_is_no_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two', expected a number"):
        launch.launched_size()
