"""What eviction costs and saves: policies and budgets on continuations, decode time, and a stream without end.

    python bench/eviction.py [--model MODEL] [--data SRC] [--eval-data SRC] [--parts quality time stream] [--json PATH]

quality: contexts of 1024 tokens, 3/4 of them a prompt, the rest in passes of 8 (`evaluation/continuation.py`), for
artifacts of 3 and 4 effective bits and one of 8 bits a code, nearly unquantized; all trials take turns on every batch.
Standard errors are paired: of differences sequence by sequence. time: token by token at a context of 2048, caches in
turn, medians. stream: tokens in passes of 8 through a cache of constant size, and the same text recomputed from scratch
in windows of as many tokens, unquantized. Every part is written when it is done; `--parts` measures only these anew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from kvcalib.evaluation.continuation import evaluate_continuations, standard_error
from kvcalib.evaluation.trials import Trial, cache_bytes, tokens_kept
from kvcalib.files import write_json
from kvcalib.model.loading import load_model, load_tokenizer
from kvcalib.model.text import token_sequences
from kvcalib.rundir import RunDir
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.loader import load, prove
from kvcalib.stages import allocate, build, fisher, fit_nuq, friendliness
from kvcalib.stages.dial import budget_of

PARTS = ("quality", "time", "stream")
POLICIES = ("window", "h2o", "qhitter-published", "qhitter")
STEP = 8
EXACT = "8-bit codes"
BYTES_BAR, TIME_BAR, STREAM_BAR = 1 / 17, 1.15, 0.05


def make_artifacts(options, model):
    """`{name: artifact}` of one calibration: budgets in effective bits, and one width of 8 for all."""
    run = RunDir(options.run, create=True)
    settings = fisher.FisherSettings(data=options.data, samples=16, seq_len=512)
    fisher.run(run, options.model, settings, model=model)
    fit_nuq.run(run, fit_nuq.FitNuqSettings())
    friendliness.run(run)
    made = {}
    for bits in sorted(options.bits, reverse=True):
        path = options.run / f"bits{bits:g}"
        found, widths = allocate.run(run, allocate.AllocateSettings(budget=bits))
        build.run(run, path, None, None, 0, True, widths, budget_of(found), found.options)
        made[f"{bits:g} bits"] = load(path)
    path = options.run / "codes8"
    build.run(run, path, 8, 8, overwrite=True)
    return made | {EXACT: load(path)}


# Part 1: quality.


@dataclass(frozen=True, eq=False)
class Shared(Trial):
    """A trial that reads prompts together with others of its policy: a share of tokens is let go after the prompt."""

    memo: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def run(self, *given):
        with super().run(*given) as session:
            session.read = lambda ids: self.read(session, ids)
            yield session

    def read(self, session, ids):
        """What `Session.read` gives, from a copy of the common cache."""
        if "ids" not in self.memo or not torch.equal(ids, self.memo["ids"]):
            self.memo.update(ids=ids, cache=session.new_cache())
            with torch.no_grad():
                session.model(input_ids=ids, past_key_values=self.memo["cache"], logits_to_keep=1)
        cache = copy.deepcopy(self.memo["cache"])
        for layer, mine in zip(cache.layers, session.new_cache().layers, strict=True):
            layer.eviction, layer.share = mine.eviction, mine.share
            layer.counts.eviction, layer.counts.share = mine.eviction, mine.share
        cache.evict()
        return cache, None


def quality(model, name, artifact, sequences, budgets, batch_size, policies=POLICIES):
    """Rows of one artifact: without eviction, and with every policy and budget."""
    wanted = [("none", 1.0, None), ("full", 1.0, Eviction(1.0, policy="full"))]
    trials = [Trial(artifact, eviction) for _, _, eviction in wanted]
    for policy in policies:
        memo: dict = {}
        trials += [Shared(artifact, Eviction(keep, policy=policy), memo=memo) for keep in budgets]
        wanted += [(policy, keep, None) for keep in budgets]
    found = evaluate_continuations(
        model, trials, sequences, batch_size=batch_size, step=STEP,
        on_batch=lambda done: print(f"quality, {name}: {done} of {len(sequences)} sequences", flush=True),
    )  # fmt: skip
    base = found[1]
    rows = []
    for (policy, keep, _), result in zip(wanted, found, strict=True):
        measured = result.model_dump(mode="json", exclude={"artifact", "policy", "protocol"}, exclude_none=True)
        rows.append(
            measured
            | {
                "artifact": name, "policy": policy, "keep": keep,
                "times_smaller": result.fp16_cache_bytes / result.cache_bytes,
                "time_against_full": result.seconds_per_token / base.seconds_per_token,
                "eviction_nll": result.nll - base.nll,
                "eviction_nll_error": standard_error(result.sequence_nll, base.sequence_nll),
            }
        )  # fmt: skip
    return rows, found[0].protocol


def comparisons(rows, ours="qhitter", others=("h2o", "window", "qhitter-published")):
    """NLL of our policy less another's at the same budget, with the paired standard error."""
    at = {(row["artifact"], row["policy"], row["keep"]): row for row in rows}
    found = []
    for (artifact, policy, keep), row in at.items():
        if policy != ours:
            continue
        for other in others:
            if (artifact, other, keep) in at:
                theirs = at[artifact, other, keep]
                found.append(
                    {
                        "artifact": artifact, "keep": keep, "policy": ours, "against": other,
                        "difference": row["nll"] - theirs["nll"],
                        "error": standard_error(row["sequence_nll"], theirs["sequence_nll"]),
                        "bytes_ratio": row["cache_bytes"] / theirs["cache_bytes"],
                    }
                )  # fmt: skip
    return found


# Part 2: time.


class Clock:
    """A cache and the trial that it is of, stepped token by token.

    Attributes:
        ordinary, evicting: seconds of every timed step, of those in which tokens left apart.
        held: tokens after every timed step.
    """

    def __init__(self, trial, model, rotations, ids):
        self.trial, self.model, self.rotations = trial, model, rotations
        self.ordinary, self.evicting, self.held = [], [], []
        with trial.run(model, rotations) as session:
            self.cache = session.new_cache()
            with torch.no_grad():
                for part in torch.split(ids, 512, 1):
                    model(input_ids=part, past_key_values=self.cache, logits_to_keep=1)
            if hasattr(self.cache, "evict"):
                self.cache.evict()

    def steps(self, ids):
        """Time every step but the first, which warms up what other caches left cold."""
        with self.trial.run(self.model, self.rotations) as session:
            session.decode(ids[:, :1], self.cache)
            for i in range(1, ids.shape[1]):
                before = tokens_kept(self.cache)
                session.decode(ids[:, i : i + 1], self.cache)
                self.held.append(tokens_kept(self.cache))
                (self.ordinary if self.held[-1] > before else self.evicting).append(session.seconds[-1])

    @property
    def seconds(self):
        """A step, eviction spread over all of them; medians of both kinds."""
        rare = len(self.evicting) / len(self.held)
        both = [statistics.median(kind) if kind else 0.0 for kind in (self.ordinary, self.evicting)]
        return (1 - rare) * both[0] + rare * both[1]


def decode_times(model, artifact, context, keep, policies=POLICIES, rounds=24, steps=9):
    """Rows of two comparisons: "share", part of the context kept against all of it, and "constant", as many tokens with
    and without eviction."""
    rotations = prove(model, sorted(artifact.quantizers))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (1, context + context // 4), generator=torch.Generator().manual_seed(0))
    more = torch.randint(3, vocabulary, (1, rounds * steps), generator=torch.Generator().manual_seed(1))
    rows = []
    for kind, budget, prompt in (("share", keep, ids[:, :context]), ("constant", context, ids)):
        # Without eviction: in "constant" as many tokens as the others hold halfway between two evictions.
        length = context if kind == "share" else context - context // 32
        clocks = {"none": Clock(Trial(artifact), model, rotations, ids[:, :length])}
        clocks |= {p: Clock(Trial(artifact, Eviction(budget, policy=p)), model, rotations, prompt) for p in policies}
        if kind == "share":
            clocks["fp"] = Clock(Trial(None), model, rotations, ids[:, :length])
        for number in range(rounds):
            part = more[:, number * steps : (number + 1) * steps]
            for clock in list(clocks.values())[:: 1 if number % 2 == 0 else -1]:
                clock.steps(part)
            clocks["none"].cache.crop(-steps)
        for name, clock in clocks.items():
            rows.append(
                {
                    "comparison": kind, "policy": name, "keep": budget if name in policies else None,
                    "seconds": clock.seconds, "against_none": clock.seconds / clocks["none"].seconds,
                    "ordinary_step": statistics.median(clock.ordinary) if clock.ordinary else None,
                    "steps": len(clock.held),
                    "evicting_step": statistics.median(clock.evicting) if clock.evicting else None,
                    "evictions": len(clock.evicting), "tokens_held": statistics.fmean(clock.held),
                    "cache_bytes": cache_bytes(clock.cache),
                }
            )  # fmt: skip
    return rows


# Part 3: a stream.


def stream(model, artifact, ids, keep, last, policy, every=500):
    """NLL of the last `last` of `ids [1, N]` through a cache of `keep` tokens, and its bytes every `every` tokens."""
    trial = Trial(artifact, Eviction(keep, policy=policy, streaming=True))
    nll, sizes = [], []
    with trial.run(model, prove(model, sorted(artifact.quantizers))) as session:
        cache = session.new_cache()
        for start in range(0, ids.shape[1] - 1, STEP):
            part = ids[:, start : min(start + STEP, ids.shape[1] - 1)]
            logits = session.decode(part, cache, STEP)[0].float().log_softmax(-1)
            target = ids[0, start + 1 : start + 1 + part.shape[1]]
            nll.append(-logits.gather(1, target[:, None])[:, 0])
            if (start // STEP) % (every // STEP) == 0 or start + STEP >= ids.shape[1] - 1:
                sizes.append([start + part.shape[1], cache_bytes(cache), tokens_kept(cache)])
        seconds = statistics.median(session.seconds)
    return torch.cat(nll)[-last:].double().numpy(), sizes, seconds


@torch.no_grad()
def recomputed(model, ids, keep, last, stride, batch_size=8):
    """NLL of the last `last` of `ids [1, N]`, each predicted from its last `keep - stride + 1` to `keep` tokens alone.

    A window of `keep` tokens goes through the unquantized model from scratch and scores its last `stride` predictions.
    """
    total = ids.shape[1]
    ends = range(total - last + stride, total + stride, stride)  # exclusive ends of the targets
    windows = torch.stack([ids[0, min(end, total) - 1 - keep : min(end, total) - 1] for end in ends])
    found = np.zeros(last)
    for start in range(0, len(windows), batch_size):
        logits = model(input_ids=windows[start : start + batch_size], use_cache=False).logits[:, -stride:]
        for row, scores in enumerate(logits.float().log_softmax(-1)):
            end = min(ends[start + row], total)
            target = ids[0, end - stride : end]
            found[end - stride - (total - last) : end - (total - last)] = (
                -scores.gather(1, target[:, None])[:, 0].double().numpy()
            )
    return found


def streams(model, artifacts, ids, keep, last, policies):
    """Rows of all policies and artifacts, and of the baseline."""
    stride = max(1, keep // 16)
    base = recomputed(model, ids, keep, last, stride)
    blocks = [part.mean() for part in np.array_split(base, max(2, last // 100))]
    rows = []
    for name, artifact in artifacts.items():
        for policy in policies:
            nll, sizes, seconds = stream(model, artifact, ids, keep, last, policy)
            full = [size for tokens, size, _ in sizes if tokens > 2 * keep]
            mine = [part.mean() for part in np.array_split(nll, max(2, last // 100))]
            rows.append(
                {
                    "artifact": name, "policy": policy, "keep": keep, "nll": float(nll.mean()),
                    "difference": float(nll.mean() - base.mean()), "error": standard_error(mine, blocks),
                    "least_bytes": min(full), "most_bytes": max(full), "bytes_by_tokens": sizes,
                    "seconds_per_token": seconds,
                }
            )  # fmt: skip
            print(f"stream, {name}, {policy}: {nll.mean():.4f} ({base.mean():.4f})", flush=True)
    return {
        "rows": rows, "tokens": ids.shape[1], "last": last, "keep": keep, "stride": stride,
        "recomputed_nll": float(base.mean()),
        "protocol": f"{ids.shape[1]} tokens in passes of {STEP}; NLL of the last {last}; recomputed: the unquantized "
        f"model from scratch on windows of {keep} tokens, stride {stride}; errors over blocks of 100 tokens",
    }  # fmt: skip


# What is told.


def checks(body):
    """What issue D asks for: `(claim, found, holds)`."""
    found = []
    for row in body.get("quality", {}).get("comparisons", []):
        if row["against"] in ("h2o", "window"):
            shown = f"{row['difference']:+.4f} ± {row['error']:.4f} nats, bytes x {row['bytes_ratio']:.2f}"
            claim = f"{row['artifact']}, keep {row['keep']:g}: NLL of qhitter at most {row['against']}'s"
            found.append((claim, shown, row["difference"] <= 0))
    for row in body.get("quality", {}).get("rows", []):
        if (row["policy"], row["keep"], row["artifact"]) == ("qhitter", 0.2, "4 bits"):
            shown = f"1/{row['times_smaller']:.2f}"
            found.append(("4 bits, keep 0.2: at most 1/17 of the bytes", shown, 1 / row["times_smaller"] <= BYTES_BAR))
    for row in body.get("time", {}).get("rows", []):
        if row["policy"] not in ("none", "fp"):
            claim = f"time, {row['comparison']}, {row['policy']}: at most {TIME_BAR} of no eviction"
            found.append((claim, f"{row['against_none']:.3f}", row["against_none"] <= TIME_BAR))
    for row in body.get("stream", {}).get("rows", []):
        what = f"stream, {row['artifact']}, {row['policy']}"
        shown = f"{row['difference']:+.4f} ± {row['error']:.4f}"
        found.append((f"{what}: NLL within {STREAM_BAR} of recomputation", shown, row["difference"] <= STREAM_BAR))
        shown = f"{row['least_bytes']:.0f} to {row['most_bytes']:.0f}"
        found.append((f"{what}: memory flat", shown, row["most_bytes"] <= 1.01 * row["least_bytes"]))
    return found


def show(body, console):
    """Print the tables and the checks."""
    columns = {
        "quality": ("artifact", "policy", "keep", "kept", "bytes", "1 / x", "delta NLL", "by eviction", "error", "KLD",
                    "ms", "x full", "heavy", "attn."),
        "time": ("comparison", "policy", "tokens held", "ms", "x no eviction", "evicting step, ms", "kB"),
        "stream": ("artifact", "policy", "keep", "NLL", "less recomputed", "error", "bytes from", "to", "ms"),
    }  # fmt: skip
    for part in (p for p in PARTS if p in body):
        table = Table(title=part)
        for name in columns[part]:
            table.add_column(name, justify="right", no_wrap=True)
        for r in body[part]["rows"]:
            table.add_row(*CELLS[part](r))
        console.print(table)
        console.print(body[part].get("protocol", ""), highlight=False)
    for claim, shown, holds in checks(body):
        console.print(f"{'PASS' if holds else 'FAIL'}  {claim}: {shown}", highlight=False)


def _share(x):
    return "" if x is None else f"{100 * x:.0f} %"


CELLS = {
    "quality": lambda r: (
        r["artifact"], r["policy"], _share(r["keep"]), f"{r['kept']:.0f}", f"{r['cache_bytes']:.0f}",
        f"{r['times_smaller']:.2f}", f"{r['delta_nll']:+.4f}", f"{r['eviction_nll']:+.4f}",
        f"{r['eviction_nll_error']:.4f}", f"{r['kld']:.4f}", f"{1000 * r['seconds_per_token']:.2f}",
        f"{r['time_against_full']:.2f}", _share(r.get("overlap")), _share(r.get("captured")),
    ),
    "time": lambda r: (
        r["comparison"], r["policy"], f"{r['tokens_held']:.0f}", f"{1000 * r['seconds']:.2f}",
        f"{r['against_none']:.3f}", "" if r["evicting_step"] is None else f"{1000 * r['evicting_step']:.2f}",
        f"{r['cache_bytes'] / 1000:.1f}",
    ),
    "stream": lambda r: (
        r["artifact"], r["policy"], str(r["keep"]), f"{r['nll']:.4f}", f"{r['difference']:+.4f}", f"{r['error']:.4f}",
        f"{r['least_bytes']:.0f}", f"{r['most_bytes']:.0f}", f"{1000 * r['seconds_per_token']:.2f}",
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--eval-data", default=None, help="default: --data")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 4], help="effective bits of the artifacts")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument(
        "--exact-budgets", type=float, nargs="*", default=[0.2], help="of the artifact of 8 bits a code"
    )
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048, help="tokens of the timed caches")
    parser.add_argument("--stream-tokens", type=int, default=20000)
    parser.add_argument("--stream-keep", type=int, default=512)
    parser.add_argument("--stream-policies", nargs="+", default=["qhitter", "window"])
    parser.add_argument("--run", type=Path, default=Path("artifacts/bench-eviction.run"), help="kept for next time")
    parser.add_argument("--show", action="store_true", help="print what the JSON holds and measure nothing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "eviction.json")
    options = parser.parse_args()
    body = json.loads(options.json.read_text()) if options.json.is_file() else {}
    console = Console(width=150)
    if options.show:
        show(body, console)
        return
    model = load_model(options.model)
    artifacts = make_artifacts(options, model)
    data = options.eval_data or options.data

    def text(samples, length):
        return token_sequences(data, load_tokenizer(options.model), samples, length, "evaluate")

    def keep(part, measured):
        nonlocal body
        body |= {
            "bench": "eviction", "model": Path(options.model).name, "data": Path(data).name,
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            part: measured | {"date": datetime.now(UTC).isoformat("T", "seconds")},
        }  # fmt: skip
        body["checks"] = [{"claim": c, "found": f, "holds": bool(h)} for c, f, h in checks(body)]
        write_json(options.json, body)

    chosen = f"{max(options.bits):g} bits"
    if "quality" in options.parts:
        rows, sequences = [], text(options.samples, options.seq_len)
        for name, artifact in artifacts.items():
            budgets = options.budgets if name != EXACT else options.exact_budgets
            if not budgets:
                continue
            found, protocol = quality(model, name, artifact, sequences, budgets, options.batch_size)
            rows += found
            keep("quality", {
                "rows": rows, "comparisons": comparisons(rows), "protocol": protocol, "samples": len(sequences),
                "batch_size": options.batch_size,
            })  # fmt: skip
    if "time" in options.parts:
        rows = decode_times(model, artifacts[chosen], options.context, 0.2)
        keep("time", {"rows": rows, "context": options.context, "artifact": chosen})
    if "stream" in options.parts:
        ids = torch.from_numpy(text(1, options.stream_tokens))
        last = ids.shape[1] // 4
        four = {chosen: artifacts[chosen]}
        keep("stream", streams(model, four, ids, options.stream_keep, last, options.stream_policies))
    show(body, console)


if __name__ == "__main__":
    main()
