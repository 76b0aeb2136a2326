"""Loading a Hugging Face causal LM and its tokenizer, from a local folder or the Hub."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvcalib.errors import InputError, UnsupportedModel
from kvcalib.model.offloaded import give_back_memory, hooks
from kvcalib.model.placement import CPU, Device, local_process, parse_memory, shared_memory
from kvcalib.model.revision import commit_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
BUILTIN = "builtin"
_CODE = "trust_remote_code"
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


def pinned(name: str, revision: str | None) -> tuple[str, str | None]:
    """Where `name` is loaded from, and the commit that all files are taken of: `revision` where that is unknown."""
    where = resolve(name)
    if where != name or Path(where).is_dir():
        return where, revision
    return where, commit_of(where, revision) or revision


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    max_memory: str | None = None,
    offload: str | Path | None = None,
    process: tuple[int, int] | None = None,
    device_map: Mapping[str, Device] | None = None,
) -> PreTrainedModel:
    """The causal LM `name`, in eval mode.

    Args:
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slow.
        device: "auto" is the first GPU, else the CPU; "cpu", "cuda", "cuda:1"; or "map" to spread a large model over
            the GPUs, the host's memory and the disk (accelerate's device_map="auto").
        max_memory: with "map": what weights may take of each device of this machine, as `cpu=2GiB,0=20GiB`; devices
            that are not named hold none. Processes of one machine share it (`placement.shared_memory`).
        offload: with "map": where a folder is made for weights that go to disk and cannot stay in their checkpoint
            (no safetensors, or converted while loading). It is removed with the model. Default: the system's.
        process: number of this process on its machine, and how many they are; default: what the launcher says.
        device_map: modules by name to a GPU's number, "cpu" or "disk", in place of all of these (experts).

    Raises:
        InputError: no such model, or its files are damaged. UnsupportedModel: no causal LM.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    where, revision = pinned(name, revision)
    target = pick_device(device) if device != "map" and device_map is None else None
    mapped = {} if target is not None else _mapped(max_memory, process, device_map)
    wanted: Any = dtype
    if dtype != "auto":
        wanted = getattr(torch, dtype)
    elif target.type == "cpu" if target is not None else not _uses_gpu(mapped):
        wanted = torch.float32
    arguments: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with contextlib.ExitStack() as folders:
        if mapped:
            mapped["offload_folder"] = folders.enter_context(_folder(offload))
        model = _load(name, where, wanted, arguments, mapped)
        model.config._name_or_path = name
        if where == name and not Path(where).is_dir():
            model.config._commit_hash = revision
        if target is not None:
            torch.nn.Module.to(model, target)
        else:
            if "disk" in getattr(model, "hf_device_map", {}).values():
                give_back_memory()
            if any(Path(mapped["offload_folder"]).iterdir()):
                weakref.finalize(model, folders.pop_all().close)
    return model.eval()


def _load(name: str, where: str, dtype: Any, arguments: dict[str, Any], mapped: dict[str, Any]) -> PreTrainedModel:
    """The model as transformers makes it, complete; its errors as one line."""
    try:
        config = AutoConfig.from_pretrained(where, **arguments)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"model {name!r}: model_type {config.model_type!r} is an encoder-decoder; a causal LM is needed"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, **arguments, **mapped
        )
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
    return model


def _mapped(
    max_memory: str | None, process: tuple[int, int] | None, device_map: Mapping[str, Device] | None
) -> dict[str, Any]:
    """transformers' arguments for a model on several devices."""
    if device_map is not None:
        return {"device_map": dict(device_map)}
    here = local_process(os.environ) if process is None else process
    try:
        given = None if max_memory is None else parse_memory(max_memory)
        shared = shared_memory(given, torch.cuda.device_count(), here, _free)
    except ValueError as error:
        raise InputError(f"--max-memory is {max_memory!r}: {error}") from None
    return {"device_map": "auto", "max_memory": shared}


def _free(device: Device) -> int:
    """Bytes free of a device now."""
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available if device == CPU else torch.cuda.mem_get_info(device)[0]


def _uses_gpu(mapped: Mapping[str, Any]) -> bool:
    """Whether modules compute on a GPU; those whose weights are elsewhere do so too, then."""
    if isinstance(mapped["device_map"], dict):
        return any(str(place) not in (CPU, "disk") for place in mapped["device_map"].values())
    limits = mapped["max_memory"]
    return limits is None or any(size > 0 for device, size in limits.items() if device != CPU)


def _folder(offload: str | Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder of this model alone: processes that share `--offload` would write the same files."""
    try:
        if offload is not None:
            Path(offload).mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="kvcalib-offload-", dir=offload)
    except OSError as error:
        raise InputError(f"--offload is {str(offload)!r}: no folder can be made there ({error.strerror})") from None


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`; InputError if there is none."""
    where, revision = pinned(name, revision)
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if _CODE in str(error):
            raise _explain(name, error) from error
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
        for hook in hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return device


def compute_devices(model: PreTrainedModel) -> set[torch.device]:
    """Where parts of the model compute; `input_device` is one of them."""
    holders = [part for part in model.modules() if next(part.parameters(recurse=False), None) is not None]
    return {execution_device(part) for part in holders}


def _explain(name: str, error: Exception) -> InputError | UnsupportedModel:
    line = _first_line(error)
    if _CODE in str(error):
        return InputError(
            f"model {name!r}: brings Python code of its own, which is not run; read it, and give --trust-remote-code "
            "if you trust it"
        )
    if "Unrecognized configuration class" in str(error) or "does not recognize this architecture" in str(error):
        return UnsupportedModel(f"model {name!r}: transformers has no causal LM for it ({line})")
    return InputError(
        f"model {name!r}: cannot be loaded ({line}); give a local folder with config.json and weights, or a Hub id "
        "that this machine can reach"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
