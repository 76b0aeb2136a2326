"""One call of a kernel as data: so the same arguments can be launched, or compiled for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Launch:
    """A kernel with all it is given.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        args: run-time arguments by name: tensors, ints, floats.
        constants: compile-time arguments by name.
        warps, registers, stages: how it is compiled; `registers` is the most that a thread may take.
        fusion: whether a product and a sum may become one operation, with one rounding less.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None
    stages: int = 1
    fusion: bool = True

    def run(self) -> None:
        """Launch on the device of the tensors (in Triton's interpreter: here and now)."""
        if all(self.grid):
            device = next(a.device for a in self.args.values() if isinstance(a, torch.Tensor))
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self._start()
            else:
                self._start()

    def _start(self) -> None:
        how = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        how["enable_fp_fusion"] = self.fusion
        self.kernel[self.grid](**self.args, **self.constants, **how)


def strides(name: str, tensor: torch.Tensor | None, *axes: tuple[str, int]) -> dict[str, int]:
    """`{name_axis: stride}` of a tensor, 0 where it is absent."""
    return {f"{name}_{axis}": 0 if tensor is None else tensor.stride(dim) for axis, dim in axes}
