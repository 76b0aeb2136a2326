"""A process that has imported everything and forks one child per command, so that a hundred crashes cost seconds.

`Stem` starts it (`python -m tests.crash.stem`). A request names a command of kvcalib and what is to befall it: a signal
after so many seconds, a limit on the size of files, a full or a read-only disk. The child is the command itself, by
its own command line. Nothing is computed before the fork, so no pool of threads is cut in half by it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import io
import json
import mmap
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

ROOT = Path(__file__).parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
NEEDED = (
    "kvcalib.cli", "kvcalib.stages.pipeline", "kvcalib.stages.tiers", "kvcalib.stages.sharing",
    "kvcalib.stages.export", "kvcalib.stages.sweep", "transformers.models.llama.modeling_llama",
    "transformers.generation", "transformers.models.auto.modeling_auto",
)  # fmt: skip
PASS = "pass"
FAULT = 70
"""Exit code of a child that ended in a traceback."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


@dataclass
class Ended:
    """How a command ended: exit code, or minus the signal; its operations on files, each with the seconds before it."""

    code: int
    seconds: float
    out: str
    err: str
    operations: list[tuple[float, str]] = field(default_factory=list)
    passes: int = 0

    @property
    def done(self) -> int:
        return len(self.operations)

    @property
    def messages(self) -> list[str]:
        """The lines that say an error."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


class Stem:
    """The process to fork from."""

    def __init__(self) -> None:
        environment = (
            os.environ | ALONE | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.stem"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        self._line()

    def warm(self, *args: Any) -> None:
        """Run a command in the process to fork from; it must leave no thread behind."""
        assert self._ask({"args": [str(a) for a in args], "warm": True}) == {"threads": 1}

    def run(self, *args: Any, **fate: Any) -> Ended:
        """Run a command of kvcalib; `fate` is what `_child` and `_wait` read."""
        request = {"args": [str(a) for a in args], **{k: str(v) if isinstance(v, Path) else v for k, v in fate.items()}}
        return Ended(**self._ask(request))

    def ok(self, *args: Any, **fate: Any) -> Ended:
        """The same of a command that must succeed."""
        ended = self.run(*args, **fate)
        assert ended.code == 0, ended.err
        return ended

    def together(self, *commands: Sequence[Any]) -> list[Ended]:
        """Run commands side by side."""
        return [Ended(**e) for e in self._ask({"together": [[str(a) for a in args] for args in commands]})]

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(30) == 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the process to fork from has died; its own message is above"
        return line


def serve() -> None:
    """Answer requests until there are none."""
    for name in NEEDED:
        importlib.import_module(name)
    print(flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_warmed(request) if request.get("warm") else _answer(request)), flush=True)
    os._exit(0)  # some library complains of its own leaks otherwise


def _command() -> Any:
    """The command line, taken apart from its annotations once."""
    global _made
    if _made is None:
        import typer.main

        from kvcalib.cli import app

        _made = typer.main.get_command(app)
    return _made


_made: Any = None


def _warmed(request: dict[str, Any]) -> dict[str, Any]:
    """Run a command here, so that what is compiled and imported for it is there in every child."""
    null = io.StringIO()
    with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null), contextlib.suppress(SystemExit):
        _command().main(args=request["args"], prog_name="kvcalib")
    gc.collect()
    gc.freeze()  # or the children's collections would copy every page
    until = time.monotonic() + 5
    while (threads := len(list(Path("/proc/self/task").iterdir()))) > 1 and time.monotonic() < until:
        time.sleep(0.01)  # one that has been joined is there for another moment
    return {"threads": threads}


class _Running:
    """A child at work."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.shared = mmap.mmap(-1, 1 << 20)
        # Pipes, for a limit on the size of files is one on files that standard output goes to as well.
        self.pipes = [os.pipe(), os.pipe()]
        for read, _ in self.pipes:
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.began = time.perf_counter()
        self.child = os.fork()
        if self.child == 0:
            for number, (_, write) in enumerate(self.pipes, 1):
                os.dup2(write, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _child(request, self.shared)

    def end(self) -> dict[str, Any]:
        """Wait for the child, send it the signal it is due, and tell how it ended."""
        if "after" in self.request:
            handle = os.pidfd_open(self.child)
            if not select.select([handle], [], [], self.request["after"])[0]:
                os.kill(self.child, self.request.get("signal", signal.SIGKILL))
            os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        seconds = time.perf_counter() - self.began
        texts = []
        for read, write in self.pipes:
            os.close(write)
            with open(read, "rb") as file:
                texts.append(file.read().decode(errors="replace"))
        told = self.shared[:].split(b"\0", 1)[0].decode()
        self.shared.close()
        lines = [line.split(" ", 1) for line in told.splitlines()]
        return {
            "code": code, "seconds": seconds, "out": texts[0], "err": texts[1],
            "operations": [(float(when), what) for when, what in lines if what != PASS],
            "passes": sum(what == PASS for _, what in lines),
        }  # fmt: skip


def _answer(request: dict[str, Any]) -> Any:
    if "together" in request:
        return [running.end() for running in [_Running({"args": args}) for args in request["together"]]]
    return _Running(request).end()


def _child(request: dict[str, Any], shared: mmap.mmap) -> None:
    """Become the command; never returns."""
    code = FAULT
    try:
        # A signal that comes before the command is there to meet it says nothing of the command.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        work = Path(request.get("work", os.devnull))
        if "limit" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        if "room" in request:
            mount_tmpfs(work, request["room"])
        if "readonly" in request:
            mount_readonly(work)
        if "work" in request:
            Watch(work, shared, request.get("snapshots"), request.get("die"))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        # Tests that were started in the background of a shell are deaf to it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        _command().main(args=request["args"], prog_name="kvcalib")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        if "keep" in request:
            shutil.copytree(work, request["keep"], symlinks=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Watch:
    """Note every operation on files below `work` before it is done, and every pass of a model.

    Args:
        snapshots: copy `work` there before each operation: what a crash at this moment leaves. Before a file is put
            onto the disk (fsync) a second copy has it torn, as the power might leave it.
        die: kill this process at the operation of that number.
    """

    def __init__(self, work: Path, shared: mmap.mmap, snapshots: str | None, die: int | None) -> None:
        from kvcalib import folders

        self.work, self.shared, self.snapshots, self.die = work, shared, snapshots, die
        self.size, self.count, self.busy, self.began = 0, 0, False, time.perf_counter()
        self.turn = threading.RLock()  # one thread's operation waits for the copy that another's takes
        self.whole: dict[str, int] = {}
        fsync, exchange = os.fsync, folders._renameat2

        def synced(handle: int) -> None:
            where = str(Path(f"/proc/self/fd/{handle}").readlink())
            self.operation("fsync", where, torn=True)
            fsync(handle)
            self.whole[where] = os.fstat(handle).st_size

        def exchanged(one: Path, other: Path) -> bool:
            self.operation("exchange", other)
            return exchange(one, other)

        os.fsync, folders._renameat2 = synced, exchanged
        sys.addaudithook(self.hook)
        register_module_forward_pre_hook(self.forward)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & WRITING:
                self.operation("open", args[0])
        elif event in ("os.rename", "os.link"):
            self.operation(event, args[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self.operation(event, args[0])

    def forward(self, module: Any, _: Any) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            self.tell(PASS)

    def tell(self, what: str) -> None:
        line = f"{time.perf_counter() - self.began:.4f} {what}\n".encode()
        self.shared[self.size : self.size + len(line)] = line
        self.size += len(line)

    def operation(self, name: str, path: Any, torn: bool = False) -> None:
        if isinstance(path, int) or not os.fsdecode(path).startswith(str(self.work)):
            return
        with self.turn:
            if self.busy:
                return  # it is of a copy
            self.busy = True
            inside = Path(os.fsdecode(path)).relative_to(self.work)
            self.tell(f"{name} {inside}")
            self.count += 1
            if self.count == self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.snapshots is not None:
                copy = Path(self.snapshots) / f"{self.count:04d}"
                shutil.copytree(self.work, copy, symlinks=True, copy_function=_copy_if_there)
                here, before = self.work / inside, self.whole.get(os.fsdecode(path), 0)
                if torn and here.is_file() and here.stat().st_size > before + 1:
                    copy = copy.with_name(copy.name + "-torn")
                    shutil.copytree(self.work, copy, symlinks=True, copy_function=_copy_if_there)
                    os.truncate(copy / inside, before + (here.stat().st_size - before) * 2 // 3)
            self.busy = False


def _copy_if_there(source: Any, target: str) -> None:
    """Copy a file, unless another thread has moved it meanwhile: it is as good as not there yet."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


_LIBC = ctypes.CDLL(None, use_errno=True)
MS_REC, MS_PRIVATE, MS_BIND, MS_REMOUNT, MS_RDONLY, CLONE_NEWNS = 1 << 14, 1 << 18, 1 << 12, 1 << 5, 1, 0x20000


def _mount(source: str, target: Path | str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = (source.encode(), os.fsencode(target), kind.encode() if kind else None)
    if _LIBC.mount(*given, ctypes.c_ulong(flags), data.encode() if data else None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _own_mounts() -> None:
    """Mounts of this process are nobody else's business."""
    if _LIBC.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def mount_tmpfs(folder: Path, room: int) -> None:
    """Put a disk of `room` bytes in the place of `folder`, with a copy of what is in it."""
    _own_mounts()
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
        _mount("tmpfs", folder, "tmpfs", 0, f"size={room}")
        shutil.copytree(kept, folder, dirs_exist_ok=True, symlinks=True)


def mount_readonly(folder: Path) -> None:
    """Make `folder` read-only."""
    _own_mounts()
    _mount(str(folder), folder, None, MS_BIND)
    _mount(str(folder), folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


def may_mount() -> bool:
    """Whether this process may mount file systems."""
    child = os.fork()
    if child == 0:
        try:
            with tempfile.TemporaryDirectory() as folder:
                mount_tmpfs(Path(folder), 1 << 16)
                _LIBC.umount(os.fsencode(folder))
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EPERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    serve()
