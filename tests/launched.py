"""Processes that meet as those of a launch do, cheaply: forked from one that has imported everything.

together(2, work, folder)       # work(here, folder) in each; their answers by rank
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["accelerate", "pytest", "tests.tiny", "kvcalib.stages.fisher"])
DIED = "died"


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(here, *arguments)` gives in each of `size` processes, by rank; an error as text, `DIED` if killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server starts: its children have it too
    started = []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(rank, size, port, theirs, work, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    answers = [_answer(ours) for _, ours in started]
    for process, _ in started:
        process.join()
    return answers


def _answer(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return DIED


def _run(rank: int, size: int, port: int, answer: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from kvcalib import launch

    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    try:
        answer.send(work(launch.here(), *arguments))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
