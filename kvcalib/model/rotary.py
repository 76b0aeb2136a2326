"""The rotary embedding of a model: what it was called with, and its angles for any other position.

Keys are cached before RoPE, so at every read they must be rotated as the model itself would have done. A forward hook
on the model's rotary modules remembers each call; the same module is then asked for the angles of cached positions.
Which of the attention module's conventions applies (half-split or interleaved, all of the head or part of it, none at
all) is not guessed: `Rotation.find` tries them on the module's own keys and takes the one that is exact.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Style = Literal["none", "whole", "part"]


@dataclass
class Rotation:
    """How one attention module turns a key: `apply(x [B, H, T, D], cos, sin)`, cos and sin `[B, T, R]`.

    `style` is "none" for layers without position (NoPE), "whole" when the module's own function takes the whole head,
    "part" when only the first R channels of a head turn.
    """

    function: Callable[..., tuple[Tensor, Tensor]] | None
    style: Style

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` turned by the angles, same shape."""
        if self.style == "none" or self.function is None:
            return x
        if self.style == "whole":
            return self.function(x, x[:, :0], cos, sin)[0]
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([self.function(turned, turned[:, :0], cos, sin)[0], rest], dim=-1)

    @classmethod
    def find(cls, attention: nn.Module, plain: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor) -> Rotation | None:
        """The rotation that takes `plain` to `rotated` bit by bit, or None."""
        function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        styles: tuple[Style, ...] = ("none", "whole", "part") if function is not None else ("none",)
        for style in styles:
            candidate = cls(function, style)
            try:
                if identical(candidate.apply(plain, cos, sin), rotated):
                    return candidate
            except (RuntimeError, ValueError, TypeError):
                continue
        return None


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, NaN counting as equal to NaN: whoever checks for NaN can say more about it."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass
class RotaryCall:
    """One call of a rotary module: its angles `cos, sin` and how to ask for other positions."""

    module: nn.Module
    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    extra: dict[str, Any] = field(default_factory=dict)


class _Pass(threading.local):
    """The forward pass that is under way in this thread.

    Attributes:
        calls: of rotary modules.
        angles: the last answer for each call.
        asking: whether a module now runs for us and not for the model.
    """

    def __init__(self) -> None:
        self.calls: list[RotaryCall] = []
        self.angles: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.asking = False


class RotaryRecorder:
    """Remembers the rotary calls of this thread's forward pass and answers for other positions."""

    def __init__(self, model: nn.Module) -> None:
        self._pass = _Pass()
        modules = [m for m in model.modules() if "rotary" in type(m).__name__.lower() and not list(m.children())]
        self._handles = [m.register_forward_hook(self._remember, with_kwargs=True) for m in modules]
        self.found = bool(modules)

    @torch.compiler.disable
    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._pass.asking or not (isinstance(output, tuple) and len(output) == 2):
            return
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        positions = given.pop("position_ids", None)
        given.pop("x", None)
        if isinstance(positions, Tensor):
            self._pass.calls.append(RotaryCall(module, positions, output[0], output[1], given))

    def start(self) -> None:
        """Forget the calls of the forward pass before."""
        self._pass.calls.clear()
        self._pass.angles.clear()

    def finish(self) -> None:
        """The pass is over: forget its calls, unless a backward pass may run its layers again (checkpointing)."""
        self._pass.angles.clear()
        if not torch.is_grad_enabled():
            self._pass.calls.clear()

    def match(self, cos: Tensor) -> RotaryCall | None:
        """The call that produced `cos`: the same tensor, else (a copy on another device) the same values."""
        calls = self._pass.calls
        for call in reversed(calls):
            if call.cos is cos:
                return call
        if len(calls) == 1:
            return calls[0]
        for call in reversed(calls):
            if call.cos.shape == cos.shape and torch.equal(call.cos.to(cos.device), cos):
                return call
        return None

    def angles(self, call: RotaryCall, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of `positions [B or 1, T]`, each `[B or 1, T, R]`, in the dtype and device of `call`.

        Layers of one forward pass ask for the same positions; the last answer per call is kept until `start`.
        """
        kept = self._pass.angles.get(id(call))
        if kept is not None and kept[0] is positions:
            return kept[1]
        self._pass.asking = True
        try:
            probe = torch.empty(1, 1, 1, dtype=call.cos.dtype, device=call.position_ids.device)
            ids = positions.to(call.position_ids.device, call.position_ids.dtype)
            answer = call.module(probe, position_ids=ids, **call.extra)
        finally:
            self._pass.asking = False
        self._pass.angles[id(call)] = (positions, answer)
        return answer

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
