"""What a command says when the system fails it, or asks it to end."""

import errno
import os
import signal

import pytest
import typer

from kvcalib.cli.terminal import errors


def said(capsys, raising) -> tuple[int, str]:
    with pytest.raises(typer.Exit) as ended, errors():
        raising()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return ended.value.exit_code, lines[0]


def fail(number: int, name: str | None):
    def raising():
        raise OSError(number, os.strerror(number), name)

    return raising


@pytest.fixture
def output(monkeypatch):
    """Standard output is not put aside, which the rest of the tests need."""
    monkeypatch.setattr("kvcalib.cli.terminal._drop_output", lambda: None)


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (errno.ENOSPC, "plot.svg", "error: plot.svg: the disk is full, nothing was changed"),
        (errno.ENOSPC, None, "error: standard output: the disk is full"),
        (errno.EROFS, "a", "error: a: not writable"),
        (errno.EMFILE, "a", "error: a: cannot be written (Too many open files)"),
    ],
)
def test_error_of_the_system_is_one_message(capsys, output, number, name, message):
    code, line = said(capsys, fail(number, name))
    assert code == 2
    assert line.startswith(message)


def test_other_errors_are_not_hidden():
    with pytest.raises(OSError, match="no number"), errors():
        raise OSError("no number")
    with pytest.raises(ZeroDivisionError), errors():
        raise ZeroDivisionError


def test_asked_to_end(capsys):
    before = signal.getsignal(signal.SIGTERM)
    # Tests that were started in the background of a shell are deaf to Ctrl-C.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert said(capsys, lambda: os.kill(os.getpid(), signal.SIGTERM)) == (143, "error: ended by a signal (SIGTERM)")
        assert said(capsys, lambda: os.kill(os.getpid(), signal.SIGINT)) == (130, "error: interrupted")
    finally:
        signal.signal(signal.SIGINT, deaf)
    assert signal.getsignal(signal.SIGTERM) == before
