"""Can the kernels run this layer on this device? If not, the reason in words."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from kvcalib.model.angles import Angles
from kvcalib.quant.packing import GROUP
from kvcalib.quant.quantizer import Quantizer

MAX_DIM = 256
MAX_ELEMENTS = 32767
OLDEST = 8


def supports(key: Quantizer, value: Quantizer, angles: Angles | None, device: torch.device) -> str | None:
    """None if the kernels can run a layer of these quantizers, else why not; the torch path then reads the cache."""
    reason = _device_reason(torch.device(device))
    if reason:
        return reason
    for name, quantizer in (("key", key), ("value", value)):
        heads, dim = quantizer.layout.widths.shape
        if dim % GROUP or dim > MAX_DIM:
            return f"{name} head_dim is {dim}, the kernels take multiples of {GROUP} up to {MAX_DIM}"
        if heads * dim > MAX_ELEMENTS:
            return f"{name}s have {heads * dim} elements a token, the kernels take up to {MAX_ELEMENTS}"
    if key.relative:
        return "key.relative is True, the kernels take keys whose codebook is not"
    if angles is not None:
        dim = key.layout.widths.shape[1]
        channels = torch.cat([angles.first, angles.second]).cpu()
        if not torch.equal(channels.sort().values, torch.arange(dim)):
            return f"angles name {len(channels)} channels, the kernels take each of 0..{dim - 1} once"
    return None


@cache
def _device_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on Linux: pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"device is {device.type}, the kernels run on cuda (NVIDIA)"
    major, minor = torch.cuda.get_device_capability(device)
    if major < OLDEST:
        return f"the GPU's compute capability is {major}.{minor}, the kernels take {OLDEST}.0 and newer"
    return None
