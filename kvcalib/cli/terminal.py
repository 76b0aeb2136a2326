"""What every command does with the terminal: errors as one message and an exit code, settings from options."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import typer.core
import typer.exceptions
from rich.console import Console

from kvcalib.errors import InputError, KvcalibError, NotWritable

# Without a terminal rich would cut tables at 80 columns.
out_console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


class Commands(typer.core.TyperGroup):
    """Usage errors in the form of all other errors: one line with the option, the value found and what was expected."""

    def main(self, args: Any = None, prog_name: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run the command; see click's `Command.main`."""
        if not kwargs.pop("standalone_mode", True):
            return super().main(args, prog_name, **kwargs, standalone_mode=False)
        try:
            code = super().main(args, prog_name, **kwargs, standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):  # before the command itself has begun
            _print_error("interrupted")
            sys.exit(130)
        except typer.exceptions.TyperException as error:
            if speaks():
                _print_error(_with_value(error, list(sys.argv[1:] if args is None else args)))
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _with_value(error: Any, given: list[str]) -> str:
    """The message of a usage error, with the value that the option was given."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    options = getattr(getattr(error, "param", None), "opts", [])
    # The last one counts where an option is given twice.
    values = [value for option, value in itertools.pairwise(given) if option in options]
    return f"{options[0]} is {values[-1]}: {message}" if values else f"{message} (see kvcalib --help)"


def speaks() -> bool:
    """Whether this is the first process of its launch, which says what all of them would say."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from kvcalib import launch  # takes torch, which `--help` does not wait for

    return launch.launched_rank() == 0


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Errors meant for the user become one message and their exit code."""
    with _end_on_term():
        try:
            yield
            sys.stdout.flush()
        except KvcalibError as error:
            _fail(str(error), error.exit_code, _said_elsewhere(error))
        except Terminated:
            _fail("ended by a signal (SIGTERM)", 143)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            # The reader of our output (head, less) has gone; that is its right.
            _drop_output()
            raise typer.Exit(0) from None
        except OSError as error:
            if error.errno is None:
                raise
            from kvcalib.files import write_error  # takes torch, which `--help` does not wait for

            _drop_output()
            _fail(str(write_error(Path(str(error.filename or "standard output")), error)), NotWritable.exit_code)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as `kill` and batch systems do."""


@contextlib.contextmanager
def _end_on_term() -> Iterator[None]:
    """SIGTERM is Ctrl-C by another name: locks are given back, temporary files removed."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_output() -> None:
    """What is not yet printed is not tried again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _said_elsewhere(error: KvcalibError) -> bool:
    """Whether the first process of a launch has the same error and says it."""
    if speaks():
        return False
    from kvcalib import launch

    return error.shared or not launch.met()


def _fail(message: str, code: int, said: bool = False) -> None:
    if not said:
        _print_error(message)
    raise typer.Exit(code) from None


def _print_error(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True).print(f"[bold red]error[/]: {_escape(line)}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def quiet_libraries() -> None:
    """transformers' own bars and hints would tear our progress bars; its errors reach the user through ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that weights are offloaded, we say with their sizes
    warnings.showwarning = _show_warning


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        Console(stderr=True).print(f"[yellow]warning[/]: {_escape(str(message))}", highlight=False, soft_wrap=True)


def make_settings(kind: Callable[..., Any], **values: Any) -> Any:
    """A stage's settings, or an error that names the option."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several options together
            raise InputError(first["msg"].removeprefix("Value error, ")) from None
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from None


def one_dial(bits: float | None, key_bits: int | None, value_bits: int | None) -> dict[str, int]:
    """The code widths that were given, if no budget was; both are refused, and so is a budget of nothing."""
    uniform = {n: v for n, v in (("key_bits", key_bits), ("value_bits", value_bits)) if v is not None}
    if bits is not None and uniform:
        option = "--" + next(iter(uniform)).replace("_", "-")
        raise InputError(
            f"--bits {bits:g} (a budget in effective bits) and {option} (one code width for all) exclude each other; "
            "give one of the two"
        )
    if bits is not None and not 0 < bits < float("inf"):
        raise InputError(f"--bits is {bits:g}: expected effective bits above 0, such as 2.5")
    return uniform


def numbers(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{option} is {given!r}, expected layer indices with commas between them, as 0,5") from None
