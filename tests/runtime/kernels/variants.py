"""The kernel variants that are compiled ahead of time: every compile-time branch at least once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvcalib.runtime.kernels.attention import attention_launches
from kvcalib.runtime.kernels.drawn import Drawing
from kvcalib.runtime.kernels.encode import encode_launch
from tests.runtime.kernels.layers import Case, make_layer

BF16 = torch.bfloat16
MIXED = {"key_bits": "mixed", "value_bits": "mixed"}
LLAMA = {"heads": 2, "group": 4, "dim": 128, "dtype": BF16, "length": 128, "batch": 1, "relative": False}
RELATIVE = LLAMA | {"relative": True}
# What a served model of today uses at decode: bfloat16, GQA 4, head_dim 128, one width or groups, two outliers a head.
MAIN = {
    **{f"decode {w} bit": Case(**LLAMA, key_bits=w, value_bits=w) for w in (2, 3, 4)},
    "decode 3 bit, no outliers": Case(**LLAMA, outliers=0),
    "decode groups": Case(**LLAMA, **MIXED),
    "decode groups, relative values": Case(**RELATIVE, **MIXED),
    "decode groups, sinks and window": Case(**LLAMA, **MIXED, sinks=4, recent=16),
    "decode groups, mask": Case(**LLAMA, **MIXED, mask="bool"),
    "decode groups, positions per head": Case(**LLAMA, **MIXED, per_head=True),
    "decode groups, drawn": Case(**LLAMA, **MIXED),
    "decode groups, mask, sinks and window, per head, drawn": Case(
        **LLAMA, **MIXED, mask="bool", sinks=4, recent=16, per_head=True
    ),
}
# Every compile-time branch that MAIN leaves out, several to a variant where they do not touch each other.
OTHER = {
    "decode 8 bit": Case(**LLAMA, key_bits=8, value_bits=8),
    "decode groups, head_dim 80": Case(**{**LLAMA, "dim": 80}, **MIXED),
    "decode groups, head_dim 256": Case(**{**LLAMA, "dim": 256}, **MIXED),
    "decode free widths, token scope": Case(**LLAMA, key_bits="free", value_bits="free", scope="token", outliers=5),
    "decode float mask, softcap, sink logits": Case(**LLAMA, mask="float", softcap=30.0, sink_logits=True),
    "decode fp16, no rotation": Case(**{**LLAMA, "dtype": torch.float16}, style="none"),
    "decode fp16, relative values": Case(**{**RELATIVE, "dtype": torch.float16}),
    "decode fp32": Case(**{**LLAMA, "dtype": torch.float32}),
    "few queries": Case(**LLAMA, queries=6),
    "prefill groups": Case(**LLAMA, queries=32, **MIXED, recent=32),
    "prefill groups, drawn": Case(**LLAMA, queries=32, **MIXED, recent=32),
    "prefill head_dim 256": Case(**{**LLAMA, "dim": 256}, queries=32, mask="bool"),
}


def attention_of(case: Case, splits: int = 2, drawn: bool = False) -> list[Any]:
    """The launches of a case, nothing launched."""
    layer = make_layer(case)
    x = layer.query, layer.view, layer.angles, layer.mask, layer.scaling, layer.softcap, layer.sink_logits, splits
    drawing = Drawing(torch.empty(case.batch, case.heads, layer.view.total)) if drawn else None
    return attention_launches(*x, drawing=drawing)[1]


def encode_of(case: Case, residue: bool = False) -> Any:
    """The launch that encodes one token of a case, not launched."""
    layer = make_layer(case)
    x = torch.zeros(1, 1, case.heads, case.dim, dtype=case.dtype)
    rows = {n: t[:, :1] for n, t in layer.view.rows.items()}
    to = torch.zeros(2, 1, 1, case.heads, 2)
    return encode_launch(x, x, layer.view.key, layer.view.value, rows, (to[0], to[1]) if residue else None)


ENCODE = {
    "encode": Case(**LLAMA),
    "encode free widths, token scope": Case(**LLAMA, key_bits="free", value_bits="free", scope="token", outliers=3),
    "encode without outliers": Case(**LLAMA, outliers=0),
    "encode, residue": Case(**LLAMA),
    "encode, feedback": Case(**LLAMA, **MIXED, feedback=True),
    "encode, relative values": Case(**RELATIVE),
    "encode, relative values, feedback, residue": Case(**RELATIVE, **MIXED, feedback=True),
    "encode, feedback, residue": Case(**LLAMA, **MIXED, feedback=True),
    "encode free widths, token scope, no outliers, feedback": Case(
        **{**LLAMA, "dim": 80}, key_bits="free", value_bits="free", scope="token", outliers=0, feedback=True
    ),
    "encode free widths, token scope, residue": Case(
        **LLAMA, key_bits="free", value_bits="free", scope="token", outliers=3
    ),
    "encode free widths, token scope, relative values, residue": Case(
        **RELATIVE, key_bits="free", value_bits="free", scope="token", outliers=3
    ),
}


def names() -> list[str]:
    """Every variant's name."""
    return [*MAIN, *OTHER, *ENCODE, "reduce", "reduce, drawn", "drawn"]


def every_launch() -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """(name, whether it is a main variant, what makes its launch)."""
    for name, case in {**MAIN, **OTHER}.items():
        splits, drawn = 1 if case.queries > 8 else 2, name.endswith("drawn")
        yield name, name in MAIN, lambda case=case, splits=splits, drawn=drawn: attention_of(case, splits, drawn)[0]
    for name, case in ENCODE.items():
        residue = name.endswith("residue")
        yield name, name.startswith("encode,") or name == "encode", lambda c=case, r=residue: encode_of(c, r)
    yield "reduce", True, lambda: attention_of(Case(**LLAMA))[1]
    for number, name in enumerate(["reduce, drawn", "drawn"]):
        yield name, True, lambda number=number: attention_of(Case(**LLAMA), drawn=True)[1 + number]
