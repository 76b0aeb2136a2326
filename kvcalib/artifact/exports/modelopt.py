"""`--to modelopt`: `hf_quant_config.json` with a KV-cache format for every layer, as NVIDIA's Model Optimizer has it.

Schema version 1 of `kv_cache_quantized_layers` (NVIDIA/Model-Optimizer#2272): FP8 or NVFP4 for keys and values
together; a layer that is not named stays unquantized. The envelope is the one for unquantized weights, `quant_algo`
MIXED_PRECISION with no quantized weight layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcalib.artifact.exports.export import MODULE, Export, Facts, missing_layers, module_name, render
from kvcalib.errors import InputError
from kvcalib.quant.floats import NVFP4_BLOCK

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelOpt(Export):
    """Formats by layer, for TensorRT-LLM's and vLLM's readers.

    Attributes:
        module: name of a layer's attention module, `{}` standing for its index.
    """

    module: str = MODULE
    name: ClassVar[str] = "modelopt"
    reads: ClassVar[tuple[str, ...]] = ("run", "artifact")
    names: ClassVar[tuple[str, ...]] = ("hf_quant_config.json",)

    def files(self, facts: Facts) -> dict[str, bytes]:
        """See `Export.files`."""
        layers = {
            module_name(self.module, layer.index): {"quant_algo": layer.format}
            for layer in facts.layers
            if layer.format
        }
        if not layers:
            raise InputError(
                f"{facts.origin}: with these effective bits every layer stays unquantized, there is nothing to export; "
                "give fewer --effective-bits"
            )
        body = {
            "producer": {"name": "kvcalib", "version": facts.version},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {},
                "kv_cache_quant_algo": "MIXED_PRECISION",
                "group_size": NVFP4_BLOCK,
                "exclude_modules": [],
                "kv_cache_quantized_layers": layers,
                "kv_cache_schema_version": SCHEMA_VERSION,
            },
        }
        return {self.names[0]: render(body)}

    def notes(self, facts: Facts) -> list[str]:
        """See `Export.notes`."""
        plain = [str(layer.index) for layer in facts.layers if not layer.format]
        absent = missing_layers(facts)
        return [
            "put it beside the checkpoint's config.json; its reader must know kv_cache_quantized_layers "
            "(docs/exports.md says which versions do)",
            *([f"unquantized: layers {', '.join(plain)}"] if plain else []),
            *([f"not calibrated, so unquantized and not counted: {absent}"] if absent else []),
            "it holds formats only: codebooks, widths by channel and outliers have no place in FP8 and NVFP4",
        ]
