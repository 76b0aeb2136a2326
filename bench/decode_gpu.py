"""Decoding on a GPU: packed attention beside bf16, one attention step and one step of a whole model.

    python bench/decode_gpu.py [--contexts 4096,16384,32768,131072] [--batches 1,8,32] [--bits 2,3,4]
        [--evicting] [--json bench/results/decode-gpu-NAME.json]

Shape of Llama-3.1-8B with random weights and random codes: 32 layers, 32 query and 8 KV heads of 128. All sides run
in one process. Baseline: SDPA's FlashAttention backend on a bf16 cache, and FlashAttention 3 or FlashInfer where they
can be imported. Times are medians with the L2 cache flushed before each call. The limit is the bytes that a step must
read over the bandwidth of a device copy measured in the same run. A model step (projections, MLP, encode, attention of
all layers) is a CUDA graph on both sides. What does not fit in memory is null. `--tiny` runs everything in seconds on
a CPU through Triton's interpreter: a test of this file, its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from kvcalib.model.angles import Angles
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.kernels.view import PackedView

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int = 32
    query_heads: int = 32
    heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    vocabulary: int = 128256
    outliers: int = 2

    def weight_bytes(self) -> int:
        """Bytes of all weights in bf16."""
        attention = self.hidden * self.dim * (2 * self.query_heads + 2 * self.heads)
        return 2 * (self.layers * (attention + 3 * self.hidden * self.inner) + 2 * self.vocabulary * self.hidden)

    def plain_bytes(self) -> int:
        """Bytes per token and layer of a bf16 cache."""
        return 2 * 2 * self.heads * self.dim


TINY = Shape(layers=2, query_heads=4, heads=2, dim=32, hidden=64, inner=96, vocabulary=97)


def angles_of(shape: Shape) -> Angles:
    p = torch.arange(shape.dim // 2)
    frequency = 500_000.0 ** -(2 * p.double() / shape.dim)
    return Angles(p, p + shape.dim // 2, frequency, torch.ones(len(p)))


def quantizers(shape: Shape, bits: int, angles: Angles) -> tuple[Quantizer, Quantizer]:
    """Random codebooks of one width, laid out in groups, as `fit-nuq` makes them; outliers per token and head."""
    order = torch.stack([angles.first, angles.second], 1).flatten().expand(shape.heads, -1)
    widths = torch.full((shape.heads, shape.dim), bits, dtype=torch.uint8)
    made = []
    for seed, laid_out in enumerate((order, None)):
        generator = torch.Generator().manual_seed(seed)
        centroids = torch.rand(shape.heads, shape.dim, 1 << bits, generator=generator).mul(2).sub(1).sort(-1).values
        layout = Layout.build(widths, "head", laid_out)
        weight = torch.ones(shape.heads, shape.dim)
        made.append(Quantizer(Codebook(widths, centroids), layout, False, "head", shape.outliers, weight))
    return made[0], made[1]


def random_rows(pair: tuple[Quantizer, Quantizer], batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Rows `[B, T, ...]` of random codes, valid outlier indices and scales of about one."""
    rows = {}
    for name, quantizer in zip(("key", "value"), pair, strict=True):
        for what, (shape, dtype) in quantizer.row_spec(torch.bfloat16).items():
            full = (batch, length, *shape)
            if what == "words":
                tensor = torch.empty(full, dtype=dtype, device=device)
                for row in tensor:
                    row.random_(-(2**31), 2**31 - 1)
            elif what == "outlier_index":
                step = quantizer.layout.widths.shape[1] // quantizer.outliers
                first = torch.randint(0, step, full, device=device, dtype=dtype)
                tensor = first + torch.arange(quantizer.outliers, device=device, dtype=dtype) * step
            else:
                tensor = torch.rand(full, device=device, dtype=dtype) + 0.5
            rows[f"{name}.{what}"] = tensor
    return rows


def view_of(pair: tuple[Quantizer, Quantizer], rows: dict[str, Tensor], positions: Tensor, length: int) -> PackedView:
    cut = {n: t[:, :length] for n, t in rows.items()}
    return PackedView(key=pair[0], value=pair[1], rows=cut, length=length, positions=positions)


def bytes_per_token(pair: tuple[Quantizer, Quantizer]) -> int:
    """Bytes that one token of one layer takes, packed."""
    specs = [spec for q in pair for spec in q.row_spec(torch.bfloat16).values()]
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after warming up; on a GPU with the L2 cache flushed before each."""
    call()
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=repeats * 10, return_mode="median")) / 1e3
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fits(call: Callable[[], Any]) -> Any:
    """What `call` returns, or None if the memory of the device does not suffice."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bf16 attention of one query, `[B, H, 1, D]`, by SDPA's flash backend where there is a GPU."""
    if q.device.type != "cuda":
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def other_baselines(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """FlashAttention 3 (or 2) and FlashInfer on the same cache, those that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    if q.device.type != "cuda":
        return found
    q_t, k_t, v_t = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            attend = __import__(module).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            continue
        found[module] = lambda attend=attend: attend(q_t, k_t, v_t)
        break
    if q.shape[0] == 1:
        try:
            import flashinfer
        except ImportError:
            return found
        found["flashinfer"] = lambda: flashinfer.single_decode_with_kv_cache(
            q_t[0, 0], k_t[0], v_t[0], use_tensor_cores=True
        )
    return found


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes read and written per second by a device-to-device copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


def attention_rows(shape: Shape, options: argparse.Namespace, device: torch.device, bandwidth: float) -> list[dict]:
    """One attention step of one layer: every context, batch and width."""
    from kvcalib.runtime.kernels.attention import packed_attention

    angles, rows = angles_of(shape), []
    scaling = shape.dim**-0.5

    def plain(batch: int, length: int) -> dict[str, float]:
        q = torch.randn(batch, shape.query_heads, 1, shape.dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, shape.heads, length, shape.dim, device=device, dtype=q.dtype) for _ in range(2))
        times = {"sdpa": seconds(lambda: plain_attention(q, k, v), device, options.repeats)}
        for name, call in other_baselines(q, k, v).items():
            times[name] = seconds(call, device, options.repeats)
        return times

    def packed(batch: int, length: int, bits: int) -> float:
        pair = quantizers(shape, bits, angles)
        q = torch.randn(batch, shape.query_heads, 1, shape.dim, device=device, dtype=torch.bfloat16)
        positions = torch.arange(length, dtype=torch.int32, device=device)[None]
        drawn = None
        if options.evicting:
            # Every head its own fifth of the tokens; slots of a token side by side, as the cache keeps them.
            steps = torch.randint(1, 10, (batch, length, shape.heads), device=device)
            positions = steps.cumsum(1).int().transpose(1, 2)
            drawn = torch.empty(batch, shape.heads, length, device=device)
        view = view_of(pair, random_rows(pair, batch, length, device), positions, length)
        return seconds(lambda: packed_attention(q, view, angles, None, scaling, drawn=drawn), device, options.repeats)

    for length in options.contexts:
        for batch in options.batches:
            base = fits(lambda length=length, batch=batch: plain(batch, length))
            for bits in options.bits:
                moved = batch * length * bytes_per_token(quantizers(shape, bits, angles))
                ours = fits(lambda length=length, batch=batch, bits=bits: packed(batch, length, bits))
                fastest = min(base.values()) if base else None
                rows.append({
                    "context": length, "batch": batch, "bits": bits, "bytes": moved,
                    "plain_bytes": batch * length * shape.plain_bytes(), "baseline_seconds": base,
                    "packed_seconds": ours, "limit_seconds": moved / bandwidth,
                    "bytes_per_second": moved / ours if ours else None,
                    "share_of_copy": moved / ours / bandwidth if ours else None,
                    "times_sdpa": base["sdpa"] / ours if ours and base else None,
                    "times_fastest": fastest / ours if ours and fastest else None,
                })  # fmt: skip
    return rows


class Model:
    """A decoder of `shape` with random bf16 weights; one step of one token per row."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        s = self.shape = shape

        def weight(*size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5)

        self.embedding, self.head = weight(s.vocabulary, s.hidden), weight(s.vocabulary, s.hidden)
        width = (s.query_heads + 2 * s.heads) * s.dim
        self.layers = [
            (weight(width, s.hidden), weight(s.hidden, s.query_heads * s.dim),
             weight(2 * s.inner, s.hidden), weight(s.hidden, s.inner))
            for _ in range(s.layers)
        ]  # fmt: skip

    def step(self, ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Logits `[B, V]` of `ids [B]`; `attend(layer, q, k, v)` stores k and v `[B, 1, H, D]` and reads."""
        s = self.shape
        x = self.embedding[ids]
        for number, (project, out, up, down) in enumerate(self.layers):
            heads = linear(rms_norm(x, (s.hidden,)), project).view(len(ids), 1, -1, s.dim)
            q, k, v = heads.split([s.query_heads, s.heads, s.heads], dim=2)
            x = x + linear(attend(number, q, k, v).reshape(len(ids), -1), out)
            gate, value = linear(rms_norm(x, (s.hidden,)), up).chunk(2, -1)
            x = x + linear(silu(gate) * value, down)
        return linear(rms_norm(x, (s.hidden,)), self.head)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [B, 1, H, D]` rotated in halves."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def step_seconds(model: Model, batch: int, length: int, bits: int | None, device: torch.device, repeats: int) -> float:
    """Seconds of one step with `length` tokens in the cache; `bits=None` is a bf16 cache."""
    shape, angles = model.shape, angles_of(model.shape)
    angle = length * angles.frequency
    cos, sin = (torch.cat([t, t]).to(device, torch.bfloat16) for t in (angle.cos(), angle.sin()))
    ids = torch.zeros(batch, dtype=torch.long, device=device)
    total = length + 1
    if bits is None:
        size = (shape.layers, 2, batch, shape.heads, total, shape.dim)
        cache = torch.empty(size, device=device, dtype=torch.bfloat16).normal_()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache[layer]
            keys[:, :, -1:] = turned(k, cos, sin).transpose(1, 2)
            values[:, :, -1:] = v.transpose(1, 2)
            return plain_attention(turned(q, cos, sin).transpose(1, 2), keys, values).transpose(1, 2)
    else:
        from kvcalib.runtime.kernels.attention import packed_attention
        from kvcalib.runtime.kernels.encode import packed_encode

        pair = quantizers(shape, bits, angles)
        held = [random_rows(pair, batch, total, device) for _ in range(shape.layers)]
        positions = torch.arange(total, dtype=torch.int32, device=device)[None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = held[layer]
            packed_encode(k, v, *pair, {n: t[:, length:] for n, t in rows.items()})
            view = view_of(pair, rows, positions, total)
            q = turned(q, cos, sin).transpose(1, 2)
            return packed_attention(q, view, angles, None, shape.dim**-0.5)

    with torch.no_grad():
        if device.type != "cuda":
            return seconds(lambda: model.step(ids, attend), device, repeats)
        for _ in range(2):
            model.step(ids, attend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.step(ids, attend)
        return seconds(graph.replay, device, repeats)


def model_rows(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """One step of the whole model: every context, batch and width."""
    model, rows = Model(shape, device), []
    for length in options.contexts:
        for batch in options.batches:
            times = {
                bits: fits(lambda b=batch, n=length, w=bits: step_seconds(model, b, n, w, device, options.repeats))
                for bits in (None, *options.bits)
            }
            for bits in options.bits:
                plain, ours = times[None], times[bits]
                rows.append({"context": length, "batch": batch, "bits": bits, "plain_seconds": plain,
                             "packed_seconds": ours, "times": plain / ours if plain and ours else None})  # fmt: skip
    return rows


def largest_context(shape: Shape, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Tokens of one sequence beside the weights: computed for 80 GB and for this card, and filled for real there."""
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    rows = []
    for bits in (None, *options.bits):
        pair = None if bits is None else quantizers(shape, bits, angles_of(shape))
        each = shape.layers * (shape.plain_bytes() if pair is None else bytes_per_token(pair))
        row = {"bits": bits, "bytes_per_token": each, "in_80_gb": (80 * 10**9 - shape.weight_bytes()) // each}
        if card is not None:
            # A twentieth stays free for activations, the workspace of the splits and fragmentation.
            tokens = int(0.95 * card - shape.weight_bytes()) // each
            row["in_this_card"] = tokens
            row["seconds_when_filled"] = fits(
                lambda n=tokens, w=bits: step_seconds(Model(shape, device), 1, n, w, device, 3)
            )
        rows.append(row)
    return rows


def show(report: dict[str, Any], console: Console) -> None:
    """The table: one line per context, batch and width."""
    table = Table(title=f"decode on {report['machine']['gpu']}: packed beside bf16")
    for name in ("context", "batch", "bits", "SDPA, us", "packed, us", "limit, us", "times SDPA", "times fastest",
                 "GB/s", "of copy", "model bf16, ms", "model packed, ms", "times"):  # fmt: skip
        table.add_column(name, justify="right")
    models = {(r["context"], r["batch"], r["bits"]): r for r in report["model"]}
    for row in report["attention"]:
        model = models.get((row["context"], row["batch"], row["bits"]), {})
        base = row["baseline_seconds"]
        cells = [
            (base["sdpa"] if base else None, 1e6, ".1f"), (row["packed_seconds"], 1e6, ".1f"),
            (row["limit_seconds"], 1e6, ".1f"), (row["times_sdpa"], 1, ".2f"), (row["times_fastest"], 1, ".2f"),
            (row["bytes_per_second"], 1e-9, ".0f"), (row["share_of_copy"], 100, ".0f"),
            (model.get("plain_seconds"), 1e3, ".2f"), (model.get("packed_seconds"), 1e3, ".2f"),
            (model.get("times"), 1, ".2f"),
        ]  # fmt: skip
        told = [f"{value * factor:{form}}" if value is not None else "-" for value, factor, form in cells]
        table.add_row(f"{row['context']:,}", str(row["batch"]), str(row["bits"]), *told)
    console.print(table)
    for row in report["largest_context"]:
        name = "bf16" if row["bits"] is None else f"{row['bits']} bit"
        card = f", {row['in_this_card']:,} in this card" if "in_this_card" in row else ""
        console.print(f"{name}: {row['in_80_gb']:,} tokens beside the weights in 80 GB{card}")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="decode on a GPU: packed attention beside bf16")
    parser.add_argument("--contexts", type=numbers, default=[4096, 16384, 32768, 131072])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip-model", action="store_true", help="only the attention step and the copy")
    parser.add_argument("--evicting", action="store_true", help="attention steps of evicting layers: positions per "
                        "head, a fifth of the tokens, and the attention drawn")  # fmt: skip
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="a test of this file on a CPU; its times mean nothing")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "decode_gpu: torch.cuda.is_available() is False, expected a CUDA device; --tiny runs without\n")

    import triton

    shape, device = (TINY, torch.device("cpu")) if options.tiny else (Shape(), torch.device("cuda"))
    if options.tiny:
        options.contexts, options.batches, options.bits, options.repeats = [40], [1, 2], [2, 3], 1
    gpu = "none" if options.tiny else torch.cuda.get_device_name(device)
    bandwidth = copy_bandwidth(device, 1 << 20 if options.tiny else 2 * GIB, options.repeats)
    report: dict[str, Any] = {
        "machine": {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "gpu": gpu,
            "platform": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": triton.__version__,
        },
        "shape": vars(shape), "evicting": options.evicting, "copy_bytes_per_second": bandwidth,
    }  # fmt: skip
    report["attention"] = attention_rows(shape, options, device, bandwidth)
    report["model"] = [] if options.skip_model else model_rows(shape, options, device)
    report["largest_context"] = largest_context(shape, options, device)

    console = Console(width=150)
    console.print(f"device copy: {bandwidth / 1e9:.0f} GB/s read and written")
    show(report, console)
    name = "tiny" if options.tiny else gpu.lower().replace(" ", "-")
    name += "-evicting" if options.evicting else ""
    path = options.json or Path(__file__).parent / "results" / f"decode-gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
