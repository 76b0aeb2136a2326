"""Registers, spills and shared memory of every kernel variant, compiled for GPUs that need not be there.

    python bench/kernels_aot.py [--only main] [--variant NAME]... [--targets 80,90] [--json FILE]

Every variant is built by the same code that launches it, from tensors of a small cache on the CPU, and compiled by
Triton and its ptxas. `stack` is the bytes per thread that the registers did not hold (spills); 0 is what the main
variants must have. `instructions` are those of the whole kernel as it lies in memory: loops once, without padding. The
occupancy is what registers and shared memory allow, in warps of a multiprocessor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# The interpreter's functions cannot be compiled, and triton reads this when it is first imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {**DTYPES, torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8"}
REGISTERS = 65536
SHARED = {80: 164 * 1024, 90: 228 * 1024}


def compile_launch(launch: Any, target: int) -> dict[str, int]:
    """Compile one launch for sm_`target`; what its cubin takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, {}, {}
    skip = {n for n in launch.kernel.do_not_specialize if isinstance(n, str)}
    for number, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(number,)] = launch.constants[name]
            continue
        value = launch.args[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + POINTERS[value.dtype]
            attrs[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in skip:
            signature[name] = "constexpr"
            constants[(number,)] = 1
        else:
            signature[name] = "i32"
            if name not in skip and value % 16 == 0:
                attrs[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    options["enable_fp_fusion"] = launch.fusion
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    used = resources(compiled.asm["cubin"])
    warps = min(64, REGISTERS // (used["registers"] * 32))
    if compiled.metadata.shared:
        warps = min(warps, SHARED[target] // (compiled.metadata.shared + 1024) * launch.warps)
    return {**used, "shared": compiled.metadata.shared, "warps": launch.warps, "occupancy_warps": warps}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread, and instructions, read off the cubin by Triton's cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, code = (
            subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    found = {name: max(int(n) for n in re.findall(rf"{name}:(\d+)", text)) for name in ("REG", "STACK", "LOCAL")}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S[^;]*;", code)
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "instructions": len(instructions)}


def variants(only: str, match: str = "", chosen: Sequence[str] = ()) -> Iterator[tuple[str, bool, Any]]:
    """(name, whether it is a main variant, launch); those `chosen` by name, unless that is empty."""
    from tests.runtime.kernels.variants import every_launch

    for name, main, make in every_launch():
        if match in name and (only == "all" or (only == "main") == main) and (not chosen or name in chosen):
            yield name, main, make()


def main() -> None:
    parser = argparse.ArgumentParser(description="registers and spills of every kernel variant")
    parser.add_argument("--only", choices=["all", "main", "other"], default="all")
    parser.add_argument("--targets", default="80,90", help="compute capabilities, such as 80,90")
    parser.add_argument("--match", default="", help="only variants whose name holds this")
    parser.add_argument("--variant", action="append", default=[], help="only the variant of this name; repeatable")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kernels-aot.json")
    options = parser.parse_args()

    import triton

    rows = []
    print(f"{'variant':<56}{'sm':>4}{'instructions':>14}{'registers':>11}{'stack':>7}{'shared':>8}{'warps':>7}"
          f"{'occupancy':>11}")  # fmt: skip
    for name, main_variant, launch in variants(options.only, options.match, options.variant):
        for target in map(int, options.targets.split(",")):
            used = compile_launch(launch, target)
            rows.append({"variant": name, "main": main_variant, "target": f"sm_{target}", **used})
            print(f"{name:<56}{target:>4}{used['instructions']:>14}{used['registers']:>11}{used['stack']:>7}"
                  f"{used['shared']:>8}{used['warps']:>7}{used['occupancy_warps']:>11}", flush=True)  # fmt: skip
    report = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "triton": triton.__version__, "torch": torch.__version__, "platform": platform.platform(), "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
