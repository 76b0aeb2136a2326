"""A run's folder: up to date, another's, or not ours."""

import errno
import json
import os

import pytest

from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.files import hash_bytes
from kvcalib.rundir import RUN_FORMAT, RunDir, fingerprint

SETTINGS = {"samples": 4, "data": "builtin"}


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run", create=True)
    run.file("out.bin").write_bytes(b"result")
    run.finish("fisher", SETTINGS, ["out.bin"])
    return run


def test_created_once_and_opened_again(tmp_path):
    path = tmp_path / "deep" / "run"
    RunDir(path, create=True)
    marker = (path / "run.json").read_bytes()
    assert json.loads(marker) == RUN_FORMAT
    RunDir(path, create=True)
    RunDir(path)
    assert (path / "run.json").read_bytes() == marker
    assert [p.name for p in path.iterdir()] == ["run.json"]


def test_empty_folder_becomes_a_run(tmp_path):
    RunDir(tmp_path, create=True)
    assert (tmp_path / "run.json").is_file()


def test_no_run_there(tmp_path):
    with pytest.raises(InputError, match="kvcalib fisher"):
        RunDir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_and_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(FolderInUse, match="holds no run"):
            RunDir(path, create=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        RunDir(tmp_path / "thesis.txt" / "run", create=True)


@pytest.mark.parametrize("found", [{"format": "kvcalib-run", "format_version": 2}, {"format": "other"}, []])
def test_run_of_another_version_is_refused(tmp_path, found):
    (tmp_path / "run.json").write_text(json.dumps(found))
    with pytest.raises(FolderInUse, match=r"run\.json"):
        RunDir(tmp_path, create=True)
    assert json.loads((tmp_path / "run.json").read_text()) == found


def test_damaged_marker_is_a_corrupt_file(tmp_path):
    (tmp_path / "run.json").write_text('{"format"')
    with pytest.raises(CorruptFile, match=r"run\.json"):
        RunDir(tmp_path)


def test_up_to_date_while_settings_and_output_are_the_same(run):
    assert run.settings("fisher") == SETTINGS
    assert run.up_to_date("fisher", dict(reversed(SETTINGS.items())))
    assert not run.up_to_date("fisher", SETTINGS | {"samples": 5})
    assert not run.up_to_date("fit-nuq", SETTINGS)
    run.file("out.bin").write_bytes(b"altered")
    assert not run.up_to_date("fisher", SETTINGS)
    run.file("out.bin").unlink()
    assert not run.up_to_date("fisher", SETTINGS)


def test_other_settings_are_refused_by_name(run):
    run.refuse_other("fisher", SETTINGS)
    run.refuse_other("fit-nuq", {"anything": 1})
    with pytest.raises(FolderInUse, match=r"samples=4, now 5.*--overwrite"):
        run.refuse_other("fisher", SETTINGS | {"samples": 5})
    with pytest.raises(FolderInUse, match="window=None, now 7"):
        run.refuse_other("fisher", SETTINGS | {"window": 7})


def test_stage_that_has_not_run_names_the_command(run):
    with pytest.raises(InputError, match="run `kvcalib fit-nuq"):
        run.settings("fit-nuq")


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": 3}', "{"])
def test_damaged_record_is_a_corrupt_file(run, text):
    (run.path / "stages" / "fisher.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"fisher\.json"):
        run.up_to_date("fisher", SETTINGS)


def test_one_writer_at_a_time(run):
    with run.lock():
        with pytest.raises(FolderInUse, match="another kvcalib process"), RunDir(run.path).lock():
            pytest.fail("two writers")
        with pytest.raises(FolderInUse), run.lock():
            pytest.fail("two writers")
    with run.lock():
        pass
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    assert not (run.path / ".lock").exists()


def test_lock_on_a_full_disk(run, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("builtins.open", "os.open"):
        monkeypatch.setattr(call, full_disk)
    with pytest.raises(InputError, match="the disk is full"), run.lock():
        pytest.fail("locked")


def test_fingerprint_is_of_the_content():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


# A stage's files and its record


def staged(run, settings=None):
    """A stage that was killed between finishing its files and moving them."""
    folder = run.path / "staged" / "fisher"
    folder.mkdir(parents=True)
    (folder / "out.bin").write_bytes(b"better")
    if settings is not None:
        record = {"settings": settings, "outputs": {"out.bin": hash_bytes(b"better")}}
        (folder / "record.json").write_text(json.dumps(record))


def test_finished_files_and_record_move_together(run):
    path = run.output("fisher", "out.bin")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"better")
    assert run.file("out.bin").read_bytes() == b"result"
    run.finish("fisher", SETTINGS | {"samples": 5}, ["out.bin"])
    assert run.file("out.bin").read_bytes() == b"better"
    assert run.up_to_date("fisher", SETTINGS | {"samples": 5})
    assert sorted(p.name for p in run.path.iterdir()) == ["out.bin", "run.json", "stages"]


def test_record_makes_what_a_killed_process_finished_count(run):
    staged(run, SETTINGS | {"samples": 5})
    again = RunDir(run.path)
    assert again.settings("fisher")["samples"] == 5
    assert again.up_to_date("fisher", SETTINGS | {"samples": 5})
    assert sorted(p.name for p in run.path.iterdir()) == ["out.bin", "run.json", "stages"]


def test_without_its_record_it_does_not(run):
    staged(run)
    assert RunDir(run.path).up_to_date("fisher", SETTINGS)
    assert sorted(p.name for p in run.path.iterdir()) == ["out.bin", "run.json", "stages"]


def test_files_on_their_way_are_left_to_the_process_that_moves_them(run):
    with run.lock():
        staged(run, SETTINGS)
        RunDir(run.path)
        assert (run.path / "staged" / "fisher" / "record.json").is_file()
    assert not (run.path / "staged").exists()


def test_record_that_does_not_fit_onto_the_disk(run, monkeypatch):
    before = run.record("fisher")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with run.lock():
        staged(run)
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="the disk is full"):
            run.finish("fisher", SETTINGS | {"samples": 5}, ["out.bin"])
        monkeypatch.undo()
    assert run.record("fisher") == before
    assert run.up_to_date("fisher", SETTINGS)
    assert not (run.path / "staged").exists()


def test_parts_of_a_finished_stage_go(run):
    for stage, settings in (("fisher", SETTINGS), ("fit-nuq", {"key_bits": 3})):
        run.parts(stage, settings).joinpath("part").write_bytes(b"x")
    with run.lock():
        pass
    assert [p.name for p in (run.path / "parts").iterdir()] == ["fit-nuq"]


def test_many_readers_or_one_writer(run):
    with run.lock(shared=True), RunDir(run.path).lock(shared=True), pytest.raises(FolderInUse), run.lock():
        pytest.fail("a writer beside readers")
    assert not (run.path / ".lock").exists()
    with run.lock():
        with run.lock(shared=True):  # the writer reads, too
            pass
        assert (run.path / ".lock").exists()
        child = os.fork()
        if child == 0:
            try:
                with run.lock(shared=True):
                    os._exit(0)
            except FolderInUse:
                os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


def test_begun_and_killed_before_its_marker_was_whole(tmp_path):
    (tmp_path / ".run.json.0123abcd.tmp").write_bytes(b"{")
    RunDir(tmp_path, create=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
