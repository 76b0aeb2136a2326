"""Triton's interpreter, without the third of its time that repeats itself."""

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Let a launch swap the functions of `triton.language` once, not again in every function that the kernel calls."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "GridExecutor"):
        return  # another Triton's: slower, as it is
    swap, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    swapped = set()

    def swap_once(fn):
        modules = frozenset(m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core)
        if modules in swapped:
            return None  # only a launch restores what it swapped, and it is the first to swap
        swapped.add(modules)
        return swap(fn)

    def launched(self, *args, **kwargs):
        swapped.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = swap_once, launched
