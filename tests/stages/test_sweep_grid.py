"""A grid's points, their keys, and every error with file, field, value and choices."""

import itertools
import re

import pytest

from kvcalib.errors import InputError
from kvcalib.stages.sweep_grid import Grid, Point, read_grid

BODY = {"model": "builtin", "grid": {"bits": [2, 3], "recent": [0, 32], "outliers": [None, 0.01]}}


def grid(**axes):
    return Grid.model_validate({"model": "builtin", "grid": axes})


def read(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(path)


def test_points_are_every_combination():
    found = {(p.bits, p.recent, p.outliers) for p in Grid.model_validate(BODY).points}
    assert found == set(itertools.product((2, 3), (0, 32), (None, 0.01)))


def test_policies_multiply_only_where_tokens_go():
    found = [(p.keep, p.policy) for p in grid(bits=3, keep=[None, 0.2], policy=["h2o", "window"]).points]
    assert found == [(None, None), (0.2, "h2o"), (0.2, "window")]


def test_baselines_are_one_point_each_and_a_value_is_a_list_of_one():
    found = grid(bits=3, recent=[0, 8], baselines=["fp16", "int:bits=4"]).points
    assert [p.baseline for p in found] == [None, None, "fp16", "int:bits=4"]
    assert len({*map(grid(bits=3, baselines=["fp16"]).key, found)}) == 4


def test_excluded_points_are_left_out():
    body = BODY | {"exclude": [{"bits": 2, "recent": [32]}]}
    found = {(p.bits, p.recent) for p in Grid.model_validate(body).points}
    assert found == {(2, 0), (3, 0), (3, 32)}


def test_keys_do_not_move_with_the_writing():
    """The same settings in other words; where and how fast it runs makes no difference either."""
    one = Grid.model_validate(BODY)
    two = Grid.model_validate(
        {
            "grid": {"outliers": (None, 0.01), "recent": (0.0, 32.0), "bits": (2.0, 3.0)},
            "model": "builtin",
            "metric": "nll",
            "calibrate": {"seq_len": 512, "device": "cpu", "batch_size": 3},
            "evaluate": {"batch_size": 7, "data": "builtin"},
        }
    )
    assert [one.key(p) for p in one.points] == [two.key(p) for p in two.points]
    assert len({one.key(p) for p in one.points}) == 8
    wide = grid(bits=[2, 3, 4], recent=[0, 32], outliers=[None, 0.01], policy=["h2o", "window"])
    assert {one.key(p) for p in one.points} < {wide.key(p) for p in wide.points}


def test_keys_and_folders_follow_what_matters():
    base = Grid.model_validate(BODY)
    point = base.points[0]
    for change in (
        {"model": "other"},
        {"calibrate": {"samples": 3}},
        {"calibrate": {"seed": 1}},
        {"evaluate": {"samples": 3}},
        {"evaluate": {"step": 4}},
        {"evaluate": {"prompt": 0.5}},
    ):
        other = Grid.model_validate(BODY | change)
        assert other.key(point) != base.key(point), change
        moved = other.names(point) != base.names(point)
        assert moved == ("evaluate" not in change), change
    for change in ({"bits": 2.5}, {"sinks": 1}, {"recent": 4.0}, {"format": "nf"}):
        other = point.model_copy(update=change)
        assert base.key(other) != base.key(point)
        same = [
            n
            for n in ("calibrated", "fitted", "built")
            if getattr(base.names(other), n) == getattr(base.names(point), n)
        ]
        shared = {"bits": ["calibrated", "fitted"], "recent": ["calibrated", "fitted", "built"]}
        assert same == shared.get(next(iter(change)), ["calibrated"])


def test_the_way_of_measuring_is_one_for_all():
    assert (grid(bits=3).way, grid(bits=3).step, grid(bits=3).prompt) == ("text", None, None)
    evicting = grid(bits=3, keep=[None, 0.2])
    assert (evicting.way, evicting.step, evicting.prompt) == ("continuations", 8, 0.75)
    adaptive = grid(bits=3, adaptive=[False, True])
    assert (adaptive.way, adaptive.step, adaptive.prompt) == ("steps", 1, None)
    # Points with and without adaptive widths see the same tokens exactly.
    assert {adaptive.settings(p).recent_tokens for p in adaptive.points} == {adaptive.calibrate.window}
    with pytest.raises(ValueError, match="adaptive beside keep"):
        grid(bits=3, adaptive=True, keep=0.2)


def test_text_that_calibrated_does_not_judge():
    body = {"model": "builtin", "data": "some.txt", "grid": {"bits": 3}}
    body |= {"calibrate": {"samples": 10, "seq_len": 100}, "evaluate": {"seq_len": 64}}
    found = Grid.model_validate(body)
    assert (found.calibrate.data, found.evaluate.data, found.skip) == ("some.txt", "some.txt", 16)
    body["evaluate"]["data"] = "other.txt"
    assert Grid.model_validate(body).skip == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {bits: 3}", "model: Field required"),
        ("model: builtin\ngrid: {bits: [3, -1]}", r"grid\.bits\.1 is -1: Input should be greater than 0"),
        ("model: builtin\ngrid: {bitz: 3}", r"grid\.bitz is 3: .*expected one of bits, outliers, sinks"),
        ("model: builtin\ngrid: {bits: 3, method: best}", r"grid\.method\.0 is 'best': .*'fisher' or 'qaq'"),
        ("model: builtin\ngrid: {bits: 3, policy: lru, keep: 0.2}", "policy is 'lru', expected one of full, window"),
        ("model: builtin\ngrid: {bits: 3, baselines: magic}", "baselines names 'magic'.*expected one of fp16"),
        ("model: builtin\ngrid: {recent: 3}", "neither bits nor baselines"),
        ("model: builtin\ngrid: {bits: []}", "neither bits nor baselines"),
        ("model: builtin\ngrid: {bits: 3, recent: []}", r"grid\.recent is \[\]: expected at least one value"),
        ("model: builtin\ngrid: {bits: 3, recent: 0.2}", "point '3 bits': --recent is 0.2, a share"),
        ("model: builtin\ngrid: {bits: 3}\nexclude: [{bits: 4}]", r"exclude\[0\]\.bits is 4, .*expected one of 3\.0"),
        ("model: builtin\ngrid: {bits: 3}\nexclude: [{bit: 4}]", r"exclude\[0\] names 'bit', expected some of bits"),
        ("model: builtin\ngrid: {bits: 3}\nexclude: [{bits: 3}]", "exclude leaves no point"),
        ("model: builtin\ngrid: {bits: 3}\ncalibrate: {sample: 3}", r"calibrate\.sample is 3: .*one of data, samples"),
        ("model: builtin\ngrid: {bits: 3}\ndata: gone.jsonl", "calibrate.data is 'gone.jsonl': no such file"),
        ("- 3", "holds list, expected fields like 'model:' and 'grid:'"),
        ("model: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_errors_name_file_field_value_and_choices(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "grid.yaml"))
    assert re.search(message, str(caught.value)), caught.value


def test_names_say_what_differs():
    found = grid(bits=[2, 3], sinks=[0, 4], keep=[None, 0.2], policy="h2o")
    assert found.points[-1].name(found.varying) == "3 bits, keep 0.2 h2o, sinks 4"
    assert Point(baseline="int:bits=4").name(()) == "int:bits=4"
