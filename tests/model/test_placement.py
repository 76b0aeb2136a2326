"""`--max-memory` as text, and devices shared among processes: pure arithmetic."""

import pytest

from kvcalib.errors import InputError
from kvcalib.model.placement import local_process, parse_memory, shared_memory

GIB = 2**30


def never(device):
    raise AssertionError(f"nobody needs to know what is free of {device}")


def test_memory_is_read():
    assert parse_memory("cpu=2GiB,0=20GiB") == {"cpu": 2 * GIB, 0: 20 * GIB}
    assert parse_memory(" 1 = 1.5 MB , cpu=0 ") == {1: 1_500_000, "cpu": 0}
    assert parse_memory("0=3TiB,1=5KB") == {0: 3 * 2**40, 1: 5000}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("", "does not begin with a device"),
        ("gpu0=2GiB", "'gpu0=2GiB' does not begin with a device"),
        ("disk=2GiB", "device"),
        ("-1=2GiB", "device"),
        ("cpu", "size of cpu is ''"),
        ("cpu=2", "size of cpu is '2'"),
        ("cpu=2gib", "size of cpu is '2gib'"),
        ("cpu=-2GiB", "size of cpu is '-2GiB'"),
        ("cpu=1e9GiB", "size of cpu is '1e9GiB'"),
        ("cpu=2GiB,", "'' does not begin with a device"),
        ("cpu=2GiB,cpu=3GiB", "cpu is given twice"),
        ("0=2GiB,00=3GiB", "00 is given twice"),
    ],
)
def test_bad_memory_says_what_and_how(given, what):
    with pytest.raises(ValueError, match="as cpu=2GiB,0=20GiB") as caught:
        parse_memory(given)
    assert what in str(caught.value)


def test_two_processes_with_four_gpus_have_two_each():
    given = {0: 20, 1: 21, 2: 22, 3: 23, "cpu": 100}
    assert shared_memory(given, 4, (0, 2), never) == {0: 20, 1: 21, "cpu": 50}
    assert shared_memory(given, 4, (1, 2), never) == {2: 22, 3: 23, "cpu": 50}
    assert shared_memory({3: 23, 1: 21}, 4, (1, 2), never) == {3: 23}


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("count", range(1, 9))
def test_every_gpu_is_used_and_none_is_promised_twice(gpus, count):
    """Whatever the numbers, processes together never get more than there is."""
    given = dict.fromkeys(range(gpus), 840) | {"cpu": 840}
    parts = [shared_memory(given, gpus, (rank, count), never) for rank in range(count)]
    for device in given:
        shares = [part[device] for part in parts if device in part]
        assert shares
        assert 840 - count < sum(shares) <= 840
    assert all(set(part) - {"cpu"} for part in parts)
    if gpus >= count:
        assert sum(len(part) - 1 for part in parts) == gpus


def test_what_is_not_given_is_what_is_free():
    free = {0: 1000, 1: 2000, 2: 3000, 3: 4000, "cpu": 500}.__getitem__
    assert shared_memory(None, 4, (1, 2), free) == {2: 2700, 3: 3600, "cpu": 225}
    assert shared_memory(None, 0, (0, 1), free) == {"cpu": 450}
    assert shared_memory(None, 1, (1, 2), free) == {0: 450, "cpu": 225}
    assert shared_memory(None, 4, (0, 1), never) is None  # accelerate balances one process over its GPUs


def test_only_this_process_own_gpus_are_asked():
    asked = []
    shared_memory(None, 4, (1, 2), lambda device: asked.append(device) or 10)
    assert asked == [2, 3, "cpu"]


@pytest.mark.parametrize(("gpus", "said"), [(0, "no GPU"), (2, "2 GPU")])
def test_a_gpu_that_is_not_there(gpus, said):
    with pytest.raises(ValueError, match=f"GPU 2 is named, but torch sees {said}"):
        shared_memory({0: 5, 2: 5}, gpus, (0, 1), never)


def test_local_process():
    assert local_process({}) == (0, 1)
    assert local_process({"LOCAL_RANK": "0"}) == (0, 1)
    assert local_process({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "RANK": "9", "WORLD_SIZE": "16"}) == (1, 4)


@pytest.mark.parametrize(
    ("rank", "count", "named"), [("4", "4", "LOCAL_RANK is 4"), ("x", "2", "'x'"), ("0", "0", "'0'"), ("0", "", "''")]
)
def test_a_launcher_that_makes_no_sense(rank, count, named):
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE") as caught:
        local_process({"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count})
    assert named in str(caught.value)
