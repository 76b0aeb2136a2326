"""The sums of a pass by name, exact: what every batch adds, how they lie in a file, and how a file's tensors are read.

A sum of float64 contributions is two tensors, `NAME.limbs` and `NAME.top` (`exact.py`); counts are int64 as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvcalib.calibration.exact import LIMBS as LIMB_COUNT
from kvcalib.calibration.exact import ExactSum
from kvcalib.errors import InputError, NonFiniteActivations

LIMBS, TOP = ".limbs", ".top"
FISHER, GRADIENT = "_fisher", "_gradient"


class Sums:
    """Sums by name, which live where their contributions do.

    Args:
        stored: what `tensors` gave, after `count` batches.
    """

    def __init__(self, stored: Mapping[str, Tensor] | None = None, count: int = 0) -> None:
        self.count = count
        self._stored = dict(stored or {})
        self._new: dict[str, Tensor] = {}
        self._flat: dict[torch.device, tuple[dict[str, torch.Size], ExactSum]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """A contribution of this batch to `name`, float64 or int64; every batch adds to the same names."""
        self._new[name] = self._new[name] + value if name in self._new else value

    def close(self) -> None:
        """The batch is complete. All its sums go as one: an exact sum is a few dozen operations, whatever its size.

        Raises:
            NonFiniteActivations: one of its contributions is not finite; named. InputError: too many batches.
        """
        for name, value in self._new.items():
            if not value.is_floating_point():
                self._stored[name] = self._stored.get(name, torch.zeros_like(value, device="cpu")) + value.cpu()
        real = {name: value for name, value in sorted(self._new.items()) if value.is_floating_point()}
        for device in sorted({value.device for value in real.values()}, key=str):
            mine = {name: value for name, value in real.items() if value.device == device}
            if device not in self._flat:
                self._flat[device] = {name: value.shape for name, value in mine.items()}, self._gather(mine, device)
            try:
                self._flat[device][1].add(torch.cat([value.reshape(-1) for value in mine.values()]))
            except ValueError:
                name = next(name for name, value in mine.items() if not bool(torch.isfinite(value).all()))
                raise NonFiniteActivations(
                    f"fisher: {name} of a batch is NaN or infinite; try --dtype float32 or bfloat16, and check the "
                    "model's weights"
                ) from None
            except OverflowError as error:
                raise InputError(f"fisher: {error}; take a larger --batch-size") from None
        self._new.clear()
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """All sums as a file has them, on the CPU."""
        found = dict(self._stored)
        for shapes, flat in self._flat.values():
            limbs, top = flat.limbs.cpu(), flat.top.cpu()
            sizes = [shape.numel() for shape in shapes.values()]
            for (name, shape), part, its in zip(shapes.items(), limbs.split(sizes, 1), top.split(sizes), strict=True):
                found[name + LIMBS], found[name + TOP] = part.reshape(-1, *shape), its.reshape(shape)
        return found

    def _gather(self, new: Mapping[str, Tensor], device: torch.device) -> ExactSum:
        """What is stored of `new`'s sums, or nothing yet, as one."""
        limbs, tops = [], []
        for name, value in new.items():
            empty = ExactSum.zeros(value.shape)
            limbs.append(self._stored.pop(name + LIMBS, empty.limbs).reshape(LIMB_COUNT, -1))
            tops.append(self._stored.pop(name + TOP, empty.top).reshape(-1))
        return ExactSum(torch.cat(limbs, 1).to(device), torch.cat(tops).to(device), self.count)


class Decoded(Mapping[str, Tensor]):
    """The tensors of a calibration by name, each computed when it is asked for.

    Its sums are float64. Where it keeps a sampled token's gradients, the Fisher information, their square, has a name
    too: `NAME_fisher` beside `NAME_gradient`.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        if name in self.stored:
            return self.stored[name]
        if (gradient := _behind(name)) in self.stored:
            return self.stored[gradient].square()
        if name + LIMBS not in self.stored:
            raise KeyError(name)
        return ExactSum(self.stored[name + LIMBS], self.stored[name + TOP]).value()

    def __contains__(self, name: object) -> bool:
        return name in self.stored or f"{name}{LIMBS}" in self.stored or _behind(str(name)) in self.stored

    def __iter__(self) -> Iterator[str]:
        for name in self.stored:
            if name.endswith(LIMBS):
                yield name.removesuffix(LIMBS)
            elif not name.endswith(TOP):
                yield name
                if name.endswith(GRADIENT):
                    yield name.removesuffix(GRADIENT) + FISHER

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _behind(name: str) -> str:
    """The gradient that the Fisher information `name` is the square of; else nothing's name."""
    return name.removesuffix(FISHER) + GRADIENT if name.endswith(FISHER) else ""


class Prefixed(Mapping[str, Tensor]):
    """The tensors whose names begin with `prefix`, without it; each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tensors if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
