"""What each stage takes, from a model's dimensions alone: seconds, host and device memory, disk.

Sizes of files and of tensors follow from shapes. What does not (an interpreter with torch, how much of a processor's
peak a pass reaches) is in `Constants`, fitted by `bench/scale.py` and checked there on a model that it was not fitted
to. `docs/scale.md` has the model in formulas, the measurements, and what large models take.

n tokens of a batch go through L layers of E hidden and I inner elements, Hq query heads and H kv heads of D elements,
and V rows of the output. The pass keeps for its way back, in elements per token: `L (2 E + 3 I + 2 Hq D + Hq + 2 H D)`,
and three times V around the loss. Weights are frozen, so none of their inputs is kept. Checkpointed, E per layer and
the above of one layer remain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcalib.calibration.attention import BLOCK
from kvcalib.model.footprint import Dimensions
from kvcalib.model.frozen import CHECKPOINT_TOKENS
from kvcalib.quant.packing import MAX_BITS
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import ROLES, FitNuqSettings

LADDER = 2 ** (MAX_BITS + 1) - 1
"""Centroids of all widths of a channel."""
EXACT = 3 * 8 + 2
"""Bytes of a sum that is kept exactly, `calibration/exact.py`."""
FLOAT = 4


@dataclass(frozen=True)
class Constants:
    """What was fitted; see `bench/scale.py`.

    Attributes:
        host: resident bytes of a process that runs a model, without the model and its pass. offline: of one that fits
            codebooks. planning: of one that gives out bits, or builds.
        loading: of a checkpoint's bytes, the share that is resident beside the weights while they are loaded.
        pass_slack: resident bytes over the bytes of the tensors that a pass keeps.
        matmul: of the probe's matrix product rate, the share that a pass reaches.
        elementwise: passes over the attention weights, at the probe's rate of copying.
        start: seconds until a command begins with its work. proof: forward passes of a few tokens before it.
        fit_host, look_host: bytes for each sampled element of a layer while it is fitted, and looked at later. fit:
            core-seconds for each.
        ladder: core-seconds to fit one channel's codebooks of all widths.
        evaluate_slack: as `pass_slack`, of an evaluation. packed: a pass on packed storage over an exact one, seconds.
    """

    host: float = 740e6
    offline: float = 500e6
    planning: float = 670e6
    loading: float = 1.0
    pass_slack: float = 1.36
    matmul: float = 0.6
    elementwise: float = 12.0
    start: float = 6.0
    proof: float = 2.0
    fit_host: float = 95.0
    look_host: float = 32.0
    fit: float = 4e-7
    ladder: float = 0.01
    evaluate_slack: float = 1.0
    packed: float = 2.0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: floating-point operations of matrix products, bytes copied, and its cores."""

    flops: float
    copied: float
    cores: int


@dataclass(frozen=True)
class Plan:
    """What is going to run, and where.

    Attributes:
        dtype: bytes of an element of the weights in memory. on_gpu: whether passes run on a GPU.
        processes: of the launch. local: those of them on this machine, which share its memory.
    """

    model: Dimensions
    fisher: FisherSettings
    fit: FitNuqSettings
    evaluate: EvalSettings
    layers: dict[int, tuple[int, int, int | None]]
    dtype: int
    on_gpu: bool
    processes: int = 1
    local: int = 1

    @property
    def rows(self) -> int:
        """Sequences of a batch."""
        return self.fisher.batch_size or max(1, 2048 // self.fisher.seq_len)

    @property
    def kept(self) -> int:
        """Tokens of the sample."""
        return min(self.fisher.keep_tokens, self.fisher.samples * self.fisher.seq_len)

    @property
    def elements(self) -> int:
        """Key elements of a token in all layers that count; as many are its values."""
        return sum(heads * head_dim for heads, head_dim, _ in self.layers.values())


@dataclass(frozen=True)
class Cost:
    """Of one stage: seconds, most bytes of one process in host memory and on its device, bytes of disk.

    Attributes:
        disk: what stays. scratch: what is there beside it until the stage is finished.
    """

    stage: str
    seconds: float
    host: float
    device: float
    disk: float
    scratch: float = 0.0


def costs(plan: Plan, rates: Rates, constants: Constants | None = None) -> list[Cost]:
    """Every stage of `kvcalib run`, in its order."""
    c = constants or Constants()
    return [
        fisher_cost(plan, rates, c),
        fit_cost(plan, rates, c),
        *small_costs(plan, rates, c),
        evaluate_cost(plan, rates, c),
    ]


def weight_bytes(plan: Plan) -> float:
    """Of the model in memory."""
    return float(plan.model.parameters * plan.dtype)


def on_host(plan: Plan, beside: float, c: Constants) -> float:
    """Of host memory for the model and `beside` it what a pass takes; on a GPU neither is there.

    While a checkpoint is read its file is mapped, and pages of it that were looked at count as resident. On a GPU too,
    but there nothing else is: the kernel takes them back when it needs to.
    """
    if plan.on_gpu:
        return 0.0
    return weight_bytes(plan) + max(c.loading * plan.model.parameters * plan.model.stored, beside)


def saved_bytes(plan: Plan) -> float:
    """What the forward pass of a batch keeps for the way back, and what the loss needs at once; see the module."""
    m, tokens = plan.model, plan.rows * plan.fisher.seq_len
    heads = max((heads * head_dim for heads, head_dim, _ in plan.layers.values()), default=0)
    # Fused attention keeps keys and values repeated for every query head.
    attention = 2 * m.query_heads * m.head_dim * (2 if plan.on_gpu else 1) + 2 * heads
    layer = 2 * m.hidden * FLOAT + (3 * m.inner + attention) * plan.dtype + m.query_heads * FLOAT
    if tokens > CHECKPOINT_TOKENS:
        kept = m.depth * m.hidden * plan.dtype + layer
    else:
        kept = m.depth * layer
    # Log-probabilities, their gradient, and that of the logits.
    loss = m.vocabulary * (3 * FLOAT + (plan.dtype if plan.dtype < FLOAT else 0))
    block = plan.rows * m.query_heads * BLOCK * plan.fisher.seq_len * FLOAT
    return float(tokens * (kept + loss) + 3 * block)


def sum_bytes(plan: Plan) -> float:
    """Of all sums, kept exactly: a layer's moments, products of its queries and of its gradients, a histogram."""
    layers = [(heads, head_dim) for heads, head_dim, _ in plan.layers.values()]
    exact = sum(7 * heads * head_dim + 2 * heads * head_dim**2 + 2 * heads for heads, head_dim in layers)
    return float(EXACT * exact + 8 * 512 * plan.model.query_heads * len(layers))


def sample_bytes(plan: Plan) -> float:
    """Of the token sample: keys and values, their Fisher, the slope of attention, five figures per head."""
    heads = sum(heads for heads, _, _ in plan.layers.values())
    return float(plan.kept * (plan.elements * (2 * plan.dtype + 2 * FLOAT + 2) + heads * 5 * FLOAT + 3 * 8))


def pass_flops(plan: Plan, tokens: float) -> float:
    """Of one forward pass over `tokens`: two for each parameter that is met, and causal attention."""
    m = plan.model
    return tokens * (2.0 * m.active + 2.0 * m.depth * m.query_heads * m.head_dim * plan.fisher.seq_len)


def _share(samples: int, rows: int, processes: int) -> int:
    """Sequences of the process that has the most, in batches of `rows`."""
    batches = math.ceil(samples / rows)
    return math.ceil(batches / processes) * rows


def fisher_cost(plan: Plan, rates: Rates, c: Constants) -> Cost:
    """Forward, back (activations only: as much again, attention two and a half times), and again if checkpointed."""
    m, batch = plan.model, plan.rows * plan.fisher.seq_len
    share = _share(plan.fisher.samples, plan.rows, plan.processes) * plan.fisher.seq_len
    again = 1 if batch > CHECKPOINT_TOKENS else 0
    flops = (
        pass_flops(plan, share) * (2 + again) + share * 3.0 * m.depth * m.query_heads * m.head_dim * plan.fisher.seq_len
    )
    weights = share * m.depth * m.query_heads * plan.fisher.seq_len / 2 * FLOAT
    seconds = flops / (rates.flops * c.matmul) + c.elementwise * weights / rates.copied
    seconds += c.start + m.parameters * m.stored / rates.copied + c.proof
    pass_ = saved_bytes(plan) * c.pass_slack
    host = c.host + on_host(plan, pass_, c) + sum_bytes(plan)
    device = (weight_bytes(plan) + pass_) if plan.on_gpu else 0.0
    disk = sample_bytes(plan) + sum_bytes(plan)
    return Cost("fisher", seconds, host, device, disk, disk + sum_bytes(plan) * plan.processes)


def ladders(plan: Plan) -> int:
    """Channels to fit: of keys and values, under every option."""
    return sum(
        len(plan.fit.options(role, heads, head_dim)) * heads * head_dim
        for heads, head_dim, _ in plan.layers.values()
        for role in ROLES
    )


def squares(plan: Plan, asked: bool) -> int:
    """Elements of a matrix for every head, if there is one: of error feedback, or of values' own axes."""
    return sum(heads * head_dim**2 for heads, head_dim, _ in plan.layers.values()) if asked else 0


def fit_cost(plan: Plan, rates: Rates, c: Constants) -> Cost:
    """Layers in parallel over cores and processes; each worker holds its layer's sample in double precision."""
    workers = max(1, min(rates.cores // plan.local, len(plan.layers)))
    layer = max((heads * head_dim for heads, head_dim, _ in plan.layers.values()), default=0)
    work = ladders(plan) * (c.ladder + plan.kept * c.fit)
    seconds = c.start + work / (workers * plan.processes)
    disk = float(ladders(plan) * (LADDER + MAX_BITS + 1) * FLOAT + 2 * plan.elements * FLOAT)
    disk += (2 * squares(plan, plan.fit.feedback) + squares(plan, plan.fit.value_basis == "pca")) * FLOAT
    return Cost("fit-nuq", seconds, c.offline + workers * layer * plan.kept * c.fit_host, 0.0, disk, disk)


def small_costs(plan: Plan, rates: Rates, c: Constants) -> list[Cost]:
    """Friendliness, allocate and build: a layer at a time, or tables without tokens."""
    layer = max((heads * head_dim for heads, head_dim, _ in plan.layers.values()), default=0)
    workers = max(1, min(rates.cores, len(plan.layers)))
    one = workers * layer * plan.kept * c.look_host
    look = 2 * plan.elements * plan.kept * c.fit / workers
    widths = 2.0 * plan.elements
    # Three bits on average: 2^3 centroids, and tables of a width, word, shifts and weight for every channel.
    artifact = 2 * plan.elements * (2**3 * FLOAT + 1 + 4 + 8 + FLOAT)
    artifact += (squares(plan, plan.fit.feedback) + squares(plan, plan.fit.value_basis == "pca")) * FLOAT
    return [
        Cost("friendliness", c.start + 4 * look, c.offline + one, 0.0, 1e5),
        Cost("allocate", c.start + look, c.planning + one + 9 * 8 * ladders(plan), 0.0, widths + 1e5),
        Cost("build", c.start + 4 * look, c.planning + one + artifact, 0.0, float(artifact)),
    ]


def evaluate_cost(plan: Plan, rates: Rates, c: Constants) -> Cost:
    """One exact pass and one on packed storage for every sequence, and logits of both side by side."""
    m, e = plan.model, plan.evaluate
    rows = e.batch_size or max(1, 2048 // e.seq_len)
    tokens = _share(e.samples, rows, plan.processes) * e.seq_len
    flops = tokens * (2.0 * m.active + 2.0 * m.depth * m.query_heads * m.head_dim * e.seq_len)
    seconds = c.start + c.proof + m.parameters * m.stored / rates.copied
    seconds += (1 + c.packed) * flops / (rates.flops * c.matmul)
    logits = rows * e.seq_len * m.vocabulary * (plan.dtype + 3 * FLOAT)
    cache = rows * e.seq_len * 2 * plan.elements * plan.dtype
    pass_ = (logits + cache) * c.evaluate_slack
    host = c.host + on_host(plan, pass_, c)
    return Cost("eval", seconds, host, (weight_bytes(plan) + pass_) if plan.on_gpu else 0.0, 1e5)
