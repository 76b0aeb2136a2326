"""`--to vllm-scales`: FP8 scales of keys and values as tensors of a checkpoint, which vLLM reads.

`kv_scales.safetensors` holds `<attention module>.k_scale` and `.v_scale`, float32 `[1]`: vLLM divides by them before it
rounds to e4m3. `quantization_config.json` is the entry of that name for the checkpoint's `config.json`, without which
vLLM makes no place for scales: compressed-tensors with a `kv_cache_scheme` and no quantized weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors.torch import save

from kvcalib.artifact.exports.export import MODULE, Export, Facts, missing_layers, module_name, render

SCALES, CONFIG = "kv_scales.safetensors", "quantization_config.json"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass(frozen=True)
class VLLMScales(Export):
    """FP8 e4m3 scales per layer, keys and values apart.

    Attributes:
        module: name of a layer's attention module in the checkpoint, `{}` standing for its index.
    """

    module: str = MODULE
    name: ClassVar[str] = "vllm-scales"
    reads: ClassVar[tuple[str, ...]] = ("run",)
    names: ClassVar[tuple[str, ...]] = (SCALES, CONFIG)

    def files(self, facts: Facts) -> dict[str, bytes]:
        """See `Export.files`."""
        tensors = {}
        for layer in facts.layers:
            for letter, scale in (("k", layer.key_scale), ("v", layer.value_scale)):
                tensors[f"{module_name(self.module, layer.index)}.{letter}_scale"] = torch.tensor([scale])
        config = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "quantization_status": "compressed",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": SCHEME,
        }
        # "format": "pt" is what transformers asks of a checkpoint's files.
        return {SCALES: save(dict(sorted(tensors.items())), metadata={"format": "pt"}), CONFIG: render(config)}

    def notes(self, facts: Facts) -> list[str]:
        """See `Export.notes`."""
        absent = missing_layers(facts)
        return [
            f"copy {SCALES} into the checkpoint's folder, name its tensors in model.safetensors.index.json if there is "
            f"one, and put {CONFIG} into config.json as quantization_config; then `vllm serve --kv-cache-dtype fp8` "
            "(docs/exports.md has the lines)",
            *([f"not calibrated, so their scale is 1: {absent}; --kv-cache-dtype-skip-layers leaves them unquantized"]
              if absent else []),
            "this is FP8, 8 bits an element: nothing of the codebooks, widths or outliers is in it",
        ]  # fmt: skip
