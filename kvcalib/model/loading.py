"""Loading a Hugging Face causal LM and its tokenizer, from a local folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvcalib.errors import InputError, UnsupportedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
BUILTIN = "builtin"
_LOADING_ERRORS = (
    "SafetensorError",
    "HFValidationError",
    "RepositoryNotFoundError",
    "StrictDataclassFieldValidationError",
    "StrictDataclassClassValidationError",
)


def resolve(name: str) -> str:
    """`builtin` is the demo model that ships with kvcalib; anything else is a folder or a Hub id."""
    if name == BUILTIN:
        from kvcalib.demo import MODEL_DIR

        return str(MODEL_DIR)
    if name.startswith((".", "/", "~")) or Path(name).exists():
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"model {name!r}: no such folder; give a folder with config.json, or a Hub id like owner/name"
            )
        if not (folder / "config.json").is_file():
            raise InputError(f"model {name!r}: the folder has no config.json; give the folder of a transformers model")
        return str(folder)
    return name


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal LM `name`, in eval mode.

    Args:
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slow.
        device: "auto" is the first GPU, else the CPU; "cpu", "cuda", "cuda:1"; or "map" to spread a large model over
            all devices (accelerate's device_map="auto").

    Raises:
        InputError: no such model, or its files are damaged. UnsupportedModel: no causal LM.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    where = resolve(name)
    target = pick_device(device) if device != "map" else None
    wanted: Any = dtype
    if dtype != "auto":
        wanted = getattr(torch, dtype)
    elif target is not None and target.type == "cpu":
        wanted = torch.float32
    arguments: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(where, **arguments)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"model {name!r}: model_type {config.model_type!r} is an encoder-decoder; a causal LM is needed"
            )
        if device == "map":
            arguments["device_map"] = "auto"
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=wanted, output_loading_info=True, **arguments)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _explain(name, error) from error
    except Exception as error:  # safetensors and hub errors have no common base
        if type(error).__name__ in _LOADING_ERRORS:
            raise _explain(name, error) from error
        raise
    model, report = loaded
    if report["missing_keys"]:
        # transformers fills them with random numbers; a calibration would be of another model.
        lacking = sorted(report["missing_keys"])
        raise InputError(
            f"model {name!r}: its weights lack {len(lacking)} tensors, the first is {lacking[0]!r}; "
            "the checkpoint is incomplete or of another architecture"
        )
    model.config._name_or_path = name
    if target is not None:
        torch.nn.Module.to(model, target)
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`; InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(resolve(name), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model {name!r}: no usable tokenizer ({_first_line(error)})") from error


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; InputError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device is {device!r}, expected auto, cpu, cuda, cuda:N or map") from error
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {device!r}, expected auto, cpu, cuda, cuda:N or map")
    count = torch.cuda.device_count()
    if target.type == "cuda" and (target.index or 0) >= count:
        raise InputError(f"--device is {device!r}, but torch sees {count or 'no'} GPU; use --device cpu")
    return target


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its token ids: the device of its embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return execution_device(embeddings)


def execution_device(module: torch.nn.Module) -> torch.device:
    """Where `module` computes: where its weights are or, if accelerate offloads them, where its hooks put them."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device


def _explain(name: str, error: Exception) -> InputError | UnsupportedModel:
    line = _first_line(error)
    if "Unrecognized configuration class" in str(error) or "does not recognize this architecture" in str(error):
        return UnsupportedModel(f"model {name!r}: transformers has no causal LM for it ({line})")
    return InputError(
        f"model {name!r}: cannot be loaded ({line}); give a local folder with config.json and weights, or a Hub id "
        "that this machine can reach"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
