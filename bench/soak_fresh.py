"""What a process that has done nothing before gives for each case of the soak, and how another result differs.

One process loads the model and forks a child for every case: (way of attaching, mode of use, seed).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from soak_modes import MODES, PLAIN, WAYS, Bed, Found, use

from kvcalib.files import hash_tensor
from kvcalib.model.loading import load_model
from kvcalib.runtime.native_loops import loops

Case = tuple[str, str, int]
# Fills what malloc gives with noise, large blocks too, which otherwise come from the system as zeros.
NOISE = {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": str(1 << 28)}


def cases(options: argparse.Namespace) -> list[Case]:
    return [(way, mode, seed) for way in options.ways for mode in options.modes for seed in range(options.seeds)]


def name_of(way: str, mode: str, seed: int) -> str:
    return f"{way}--{mode}--{seed}".replace(" ", "_").replace(",", "")


def references(options: argparse.Namespace, out: Path, noise: bool = False) -> dict[str, dict[str, str]]:
    """Run every case in a process of its own, and keep what it gives in `out`; hashes by case and tensor.

    Args:
        noise: memory comes filled with noise, as it may in a process that has used it before.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, __file__, out]
    for name in ("run", "model", "threads", "scale", "seeds"):
        command += [f"--{name}", getattr(options, name)]
    command += ["--ways", *options.ways, "--modes", *options.modes]
    subprocess.run([str(part) for part in command], check=True, env=os.environ | (NOISE if noise else {}))
    return {path.stem: digests(load_file(path)) for path in sorted(out.glob("*.safetensors"))}


def digests(found: Found) -> dict[str, str]:
    return {name: hash_tensor(t.contiguous()) for name, t in found.items()}


def difference(found: Found, path: Path) -> str:
    """The first tensor that is not what `path` holds, and by how much."""
    for name, expected in load_file(path).items():
        mine = found.get(name)
        if mine is None or mine.shape != expected.shape:
            return f"{name}: {None if mine is None else list(mine.shape)}, expected {list(expected.shape)}"
        if not torch.equal(mine, expected):
            worst = (mine.double() - expected.double()).abs().max().item()
            return f"{name}: {int((mine != expected).sum())} of {mine.numel()} elements, by up to {worst:.3g}"
    return f"tensors {sorted(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One child for each case; `soak.py` calls this.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--model")
    for name in ("threads", "scale", "seeds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, PLAIN])
    parser.add_argument("--modes", nargs="+", choices=list(MODES))
    options = parser.parse_args()
    # Loaded here, once, in one thread, and never run: a team of threads would not survive the fork.
    torch.set_num_threads(1)
    model, _ = load_model(options.model), loops()
    for case in cases(options):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(options.threads)
                bed = Bed(model, options.run, options.scale)
                bed.attach(case[0])
                found = use(bed, *case[1:])
                save_file({n: t.contiguous() for n, t in found.items()}, options.out / f"{name_of(*case)}.safetensors")
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"case {case} ended with {status} in a fresh process")


if __name__ == "__main__":
    main()
