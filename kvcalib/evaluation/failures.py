"""Contenders that cannot be measured: they say why, and the others go on."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcalib.errors import KvcalibError
from kvcalib.evaluation.contender import Contender, Unquantized


class Failures(dict[str, str]):
    """Contender's name to the reason; those in it are left out of what is still to be measured."""

    def standing(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Those that have not failed."""
        return [each for each in contenders if each.name not in self]

    @contextlib.contextmanager
    def of(self, contender: Contender) -> Iterator[None]:
        """Take down an error of `contender`; the unquantized model's own is raised."""
        try:
            yield
        except Exception as error:
            if isinstance(contender, Unquantized):
                raise
            self[contender.name] = reason(error)


def reason(error: Exception) -> str:
    """An error in one line; of one that is not meant for users also its kind and where it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, KvcalibError):
        return text
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(place[-1].filename).name}:{place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {text}{where}"
