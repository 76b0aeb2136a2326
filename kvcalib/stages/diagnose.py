"""Diagnosis of a model, for `inspect`: from a short forward pass, or from what a run's calibration has summed up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcalib.calibration.attention import drawn_attention
from kvcalib.calibration.statistics import Calibration, LayerShape
from kvcalib.errors import InputError
from kvcalib.model.diagnosis import LayerDiagnosis, key_outliers, offset_ratio, sink_share, value_outliers
from kvcalib.model.loading import input_device, load_tokenizer
from kvcalib.model.selftest import attention_layers
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps
from kvcalib.model.text import token_sequences
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import prove
from kvcalib.stages.fisher import check_vocabulary
from kvcalib.stages.progress import note

SAMPLES, SEQ_LEN = 4, 256
SHORTEST = 8


@dataclass
class _Look:
    """Handler of the pass: keys, values and what the first token draws of every layer, as results at once."""

    windows: dict[int, int | None]
    found: dict[int, LayerDiagnosis] = field(default_factory=dict)

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention; what is seen on the way is reduced to figures."""
        query, key = call.rotate_new(call.query), call.rotate_new(call.key)
        layer, length = call.tap.layer, call.key.shape[2]
        more = call.kwargs.get("softcap"), call.kwargs.get("s_aux"), self.windows[layer]
        drawn = drawn_attention(query, key, call.scaling, 1, *more)
        rows = call.key.detach().float().transpose(1, 2).flatten(0, 1)
        bias = getattr(getattr(call.tap.module, "k_proj", None), "bias", None)
        wide = rows.double()
        late = (drawn.total - drawn.early)[:, :, 0]
        by_head = sink_share(late, length - length // 2, query.shape[1] // key.shape[1])
        self.found[layer] = LayerDiagnosis(
            index=layer,
            key_bias=None if bias is None else float(bias.detach().float().norm()),
            offsets=offset_ratio(wide.sum(0), wide.square().sum(0), len(wide)).cpu(),
            # With a window the later queries do not see the first token.
            sink=None if _beyond(self.windows[layer], length) else sum(by_head) / len(by_head),
            sink_by_head=by_head,
            key_outliers=key_outliers(rows),
            value_outliers=value_outliers(call.value.detach().float().transpose(1, 2).flatten(0, 1)),
        )
        return call.plain(query, key, call.value)


def of_model(model: Any, name: str, data: str = "builtin", revision: str | None = None) -> list[LayerDiagnosis]:
    """Every layer of a loaded model, from a forward pass over `SAMPLES` sequences of at most `SEQ_LEN` tokens.

    Without a tokenizer token ids are drawn at random, and a note says so.

    Raises:
        UnsupportedModel: its attention cannot be tapped. InputError: the text cannot be read, or is not this model's.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", SEQ_LEN)
    length = max(SHORTEST, min(SEQ_LEN, longest if isinstance(longest, int) else SEQ_LEN))
    sequences = _tokens(model, name, data, length, revision)
    check_vocabulary(model, sequences, data)
    windows = attention_layers(model)
    look = _Look(windows)
    rotations = prove(model, sorted(windows))
    ids = torch.from_numpy(np.ascontiguousarray(sequences)).to(input_device(model))
    with Taps(model, look, rotations), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [look.found[index] for index in sorted(look.found)]


def _tokens(model: Any, name: str, data: str, length: int, revision: str | None) -> np.ndarray:
    try:
        tokenizer = load_tokenizer(name, revision)
    except InputError:
        if data != "builtin":
            raise
        size = model.get_input_embeddings().weight.shape[0]
        note(f"inspect: model {name!r} has no tokenizer; token ids are drawn at random, real text may look otherwise")
        return np.random.default_rng(0).integers(0, size, (SAMPLES, length))
    return token_sequences(data, tokenizer, SAMPLES, length)


def of_run(run_dir: RunDir) -> list[LayerDiagnosis]:
    """Every layer of a run's calibration: all of its tokens for offsets, its token sample for the rest.

    Raises:
        InputError: nothing has been calibrated. CorruptFile: the calibration is damaged.
    """
    path = run_dir.file(CALIBRATION)
    if not path.is_file():
        raise InputError(
            f"{run_dir.path}: no {CALIBRATION} there; run `kvcalib fisher MODEL --run {run_dir.path}` first"
        )
    calibration, _ = Calibration.load(path)
    first = calibration.tensors["sample.position"] == 0
    return [_of_layer(calibration, shape, first) for shape in calibration.info.layers]


def _of_layer(calibration: Calibration, shape: LayerShape, first: Tensor) -> LayerDiagnosis:
    info, data = calibration.info, calibration.layer(shape.index)
    drawn = data["sample.attention_sum"][first]
    queries = info.seq_len
    if info.version >= 4:
        drawn, queries = drawn - data["sample.attention_early"][first], info.seq_len - info.seq_len // 2
    by_head = sink_share(drawn, queries, shape.query_heads // shape.kv_heads)
    seen = by_head and not _beyond(shape.sliding, info.seq_len)
    return LayerDiagnosis(
        index=shape.index,
        key_bias=shape.key_bias_norm,
        offsets=offset_ratio(data["key.sum"], data["key.square_sum"], info.tokens),
        sink=sum(by_head) / len(by_head) if seen else None,
        sink_by_head=by_head,
        key_outliers=key_outliers(data["sample.key"]),
        value_outliers=value_outliers(data["sample.value"]),
    )


def _beyond(window: int | None, length: int) -> bool:
    """Whether a sliding window hides the first token from some of the later queries."""
    return window is not None and window < length
