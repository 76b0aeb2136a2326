"""Tiny random models and artifacts that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.calibration.statistics import Calibration
from kvcalib.model.identity import identify
from kvcalib.model.selftest import full_attention_layers
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.runtime.loader import Artifact, load, prove
from kvcalib.stages import build, fit_nuq

VOCABULARY = 97
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def lively(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights large enough that attention is not uniform, and norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                low = 0.5 if "norm" in name else -0.5
                parameter.uniform_(low, low + 1, generator=generator)
    return model.eval()


def tiny_llama(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    return lively(LlamaForCausalLM(LlamaConfig(**(SHAPE | overrides))), seed)


def tiny_family(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of any transformers family, its last layer attending in full."""
    config = AutoConfig.for_model(family)
    experts = {
        "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32,
        "num_experts_per_tok": 2, "ffn_hidden_size": 96, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "intermediate_size_mlp": 96, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    for name, value in ({**SHAPE, "num_hidden_layers": 4} | experts).items():
        if hasattr(config, name) or name == "head_dim":
            setattr(config, name, value)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        config.layer_types = [*layer_types[:3], "full_attention"]
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = 32 if layer_types else None
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return lively(AutoModelForCausalLM.from_config(config))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrate(
    model: PreTrainedModel,
    samples: int = 4,
    seq_len: int = 48,
    keep: int = 160,
    seed: int = 0,
    layers: list[int] | None = None,
) -> Calibration:
    settings = PassSettings("test", seed, keep, 5, 2, "0" * 64)
    rotations = prove(model, full_attention_layers(model) if layers is None else layers)
    return run_pass(model, rotations, tokens(samples, seq_len, 1).numpy(), identify(model), settings)


def as_of(version: int, record: Calibration) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `record` would say of itself, and its tensors, had a kvcalib of before written it (version 2 to 6)."""
    info = record.info.model_dump(mode="json") | {"version": version}
    sums = record.stored if version >= 5 else record.tensors
    tensors = {name: t for name, t in sums.items() if not name.endswith("_gradient")}
    tensors |= {name: t for name, t in record.tensors.items() if name.endswith("_fisher")}
    since = {4: ("attention_early", "attention_slope", "attention_later_square"), 5: ("nll", "sequences")}
    since[6] = ("fisher_outer", "fisher_outer.limbs", "fisher_outer.top")
    gone = tuple(name for number, names in since.items() if version < number for name in names)
    if version < 5:
        del info["batches"], info["merged"]
    if version < 3:
        for shape in info["layers"]:
            del shape["scaling"]
    return info, {name: t for name, t in tensors.items() if not name.endswith(gone)}


def make_run(folder: Path, model: PreTrainedModel, layers: list[int] | None = None, **fit: Any) -> RunDir:
    """A run whose fisher and fit-nuq stages are done, by nearest rounding, values as they are, unless `fit` says so.

    With error feedback a code that falls the other way, as one halfway between two centroids may, takes those after it
    along: what is compared with a simulation, or with exact tensors, would have to be compared loosely.
    """
    run = RunDir(folder, create=True)
    calibrate(model, layers=layers).save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 0}, [CALIBRATION])
    fit_nuq.run(run, fit_nuq.FitNuqSettings(**({"feedback": False, "value_basis": "none"} | fit)))
    return run


def make_artifact(folder: Path, model: PreTrainedModel, recent: int = 0, **fit: Any) -> Artifact:
    """A loaded artifact for `model`, written under `folder`."""
    build.run(make_run(folder / "run", model, **fit), folder / "artifact", recent=recent)
    return load(folder / "artifact")


def as_array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()
