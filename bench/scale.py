"""What the stages take on models of several sizes, against what `--dry-run` said: the cost model of docs/scale.md.

    python bench/scale.py                 # measure, compare, write bench/results/scale.json
    python bench/scale.py --only demo,small --stages fisher
    python bench/scale.py --plan          # what large models would take on GPUs, by the model alone

Every stage runs as its own process, by the command line, on random Llamas made here; host memory is the kernel's
figure of the process's peak. The constants of `stages/cost_model.py` were fitted to the models of FITTED; the model of
CHECKED is twice as large and has had no part in them. This process imports nothing large: a child inherits the peak
of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = {  # hidden, inner, layers, query heads, kv heads, vocabulary; heads of 64
    "demo": (256, 704, 4, 4, 2, 2048),
    "small": (512, 1408, 6, 8, 4, 8192),
    "medium": (768, 2048, 8, 12, 4, 16384),
    "large": (1024, 2816, 12, 16, 8, 16384),
}
FITTED, CHECKED = ("demo", "small", "medium"), ("large",)
SAMPLES, SEQ_LEN = 8, 512
STAGES = ("fisher", "fit-nuq", "friendliness", "allocate", "build", "eval")

MAKE = """
import json, shutil, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from kvcalib.demo import MODEL_DIR
hidden, inner, layers, heads, kv_heads, vocabulary = json.loads(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                     num_key_value_heads=kv_heads, head_dim=64, vocab_size=vocabulary, max_position_embeddings=2048)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[2])
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(Path(MODEL_DIR) / name, sys.argv[2])
"""
ESTIMATE = """
import dataclasses, json, sys
from pathlib import Path
from kvcalib.stages import dry_run
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
samples, seq_len = json.loads(sys.argv[2])
found = dry_run.run(sys.argv[1], FisherSettings(samples=samples, seq_len=seq_len), Path(sys.argv[3]), None,
                    EvalSettings(samples=samples, seq_len=seq_len))
print(json.dumps({"costs": {c.stage: dataclasses.asdict(c) for c in found.costs},
                  "rates": dataclasses.asdict(found.rates), "parameters": found.plan.model.parameters}))
"""

LARGE = {  # hidden, inner, layers, query heads, kv heads, vocabulary; heads of 128, output and embeddings apart
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
ASSUMED = {"flops": 989e12, "share": 0.4, "copied": 1.5e12, "cores": 32, "gpu": 80e9}
"""An H100's published rate for dense bfloat16, of which a pass is taken to reach 40 %; nothing here was measured."""
PLAN = """
import json, math, sys, tempfile
from pathlib import Path
from transformers import LlamaConfig
from kvcalib.cli.planning import duration
from kvcalib.model.footprint import dimensions
from kvcalib.report.words import size
from kvcalib.stages.cost_model import Constants, Plan, Rates, costs, sample_bytes, saved_bytes, sum_bytes, weight_bytes
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings
large, assumed = (json.loads(x) for x in sys.argv[1:])
rates = Rates(assumed["flops"] * assumed["share"] / Constants().matmul, assumed["copied"], assumed["cores"])
for name, (hidden, inner, layers, heads, kv_heads, vocabulary) in large.items():
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
                         vocab_size=vocabulary, dtype="bfloat16", tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = dimensions(folder)
    p = Plan(found, FisherSettings(), FitNuqSettings(), EvalSettings(), found.layers, 2, True)
    weights, pass_ = weight_bytes(p), saved_bytes(p) * Constants().pass_slack
    gpus = math.ceil((weights + pass_) / (0.9 * assumed["gpu"]))
    print(f"{name}: {size(weights)} of weights, {size(pass_)} for a pass of {p.rows * p.fisher.seq_len} tokens, "
          f"{gpus} GPU(s) of {size(assumed['gpu'])}; sample {size(sample_bytes(p))}, sums {size(sum_bytes(p))}")
    for cost in costs(p, rates):
        print(f"  {cost.stage:13} {duration(cost.seconds):>8}  host {size(cost.host):>8}  disk {size(cost.disk):>8}")
"""


def commands(model: Path, run: Path, artifact: Path) -> dict[str, list[str]]:
    """Every stage as a user would start it."""
    text = ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    return {
        "fisher": ["fisher", str(model), "--run", str(run), *text],
        "fit-nuq": ["fit-nuq", str(run)],
        "friendliness": ["friendliness", str(run)],
        "allocate": ["allocate", str(run), "--budget", "3"],
        "build": ["build", str(run), "--out", str(artifact)],
        "eval": ["eval", str(artifact), "--model", str(model), *text],
    }


def measured(arguments: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of `python -m kvcalib` with these arguments."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcalib", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    said = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kvcalib {' '.join(arguments)} failed:\n{said.decode()}")
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "host": usage.ru_maxrss * 1024,
    }


def of_files(run: Path, artifact: Path) -> dict[str, int]:
    """Bytes on disk that each stage has left."""
    folders = {"build": artifact}
    files = {
        "fisher": "calibration.safetensors",
        "fit-nuq": "codebooks.safetensors",
        "allocate": "allocation.safetensors",
    }
    found = {stage: sum(p.stat().st_size for p in f.iterdir()) for stage, f in folders.items() if f.is_dir()}
    return found | {stage: (run / name).stat().st_size for stage, name in files.items() if (run / name).is_file()}


def child(code: str, *arguments: str) -> str:
    """What a Python process prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def plan() -> None:
    """Tables of large models, on GPUs that are assumed and not measured."""
    print(child(PLAN, json.dumps(LARGE), json.dumps(ASSUMED)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SHAPES), help="models, with commas between them")
    parser.add_argument("--stages", default=",".join(STAGES), help="the first few stages; default: all")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/scale.json")
    parser.add_argument("--plan", action="store_true", help="large models by the cost model; measures nothing")
    chosen = parser.parse_args()
    if chosen.plan:
        plan()
    else:
        measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
    """Every stage of the chosen models, printed and written."""
    rows, stages = [], chosen.stages.split(",")
    titles = ("seconds", "said", "MB host", "said", "off", "MB disk", "said")
    print(f"{'model':8} {'stage':13} " + " ".join(f"{title:>8}" for title in titles))
    for name in chosen.only.split(","):
        place = Path(tempfile.mkdtemp(prefix="kvcalib-scale-"))
        try:
            model, run, artifact = place / "model", place / "run", place / "artifact"
            child(MAKE, json.dumps(SHAPES[name]), str(model))
            estimate = json.loads(child(ESTIMATE, str(model), json.dumps([SAMPLES, SEQ_LEN]), str(place)))
            steps = commands(model, run, artifact)
            taken = {stage: measured(steps[stage]) for stage in steps if stage in stages}
            disk = of_files(run, artifact)
        finally:
            shutil.rmtree(place)
        for stage, found in taken.items():
            said = estimate["costs"][stage]
            row = {
                "model": name, "fitted": name in FITTED, "parameters": estimate["parameters"], "stage": stage,
                **found, "disk": disk.get(stage), "estimate": said, "rates": estimate["rates"],
                "host_off": said["host"] / found["host"] - 1,
            }  # fmt: skip
            rows.append(row)
            sizes = (found["host"], said["host"]), (row["disk"] or 0, said["disk"])
            (host, host_said), (disk_, disk_said) = ([size / 1e6 for size in pair] for pair in sizes)
            print(
                f"{name:8} {stage:13} {found['seconds']:8.1f} {said['seconds']:8.1f} {host:8.0f} {host_said:8.0f} "
                f"{row['host_off']:+8.0%} {disk_:8.2f} {disk_said:8.2f}",
                flush=True,
            )
    from kvcalib.evaluation.provenance import machine, now, versions

    note = {"machine": machine(), "created": now(), "versions": versions(), "samples": SAMPLES, "seq_len": SEQ_LEN}
    chosen.json.write_text(json.dumps({**note, "shapes": SHAPES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
