"""`--to sglang-scales`: FP8 scales in the JSON of SGLang's `--quantization-param-path`.

    {"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"<tp rank>": {"<layer>": s}}}}

SGLang knows one scale for a layer's keys and values together, and wants every hidden layer of the model for every rank
of tensor parallelism; a layer's ranks share its scale, which covers all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcalib.artifact.exports.export import Export, Facts, missing_layers, render


@dataclass(frozen=True)
class SGLangScales(Export):
    """FP8 e4m3 scales per layer, one for keys and values.

    Attributes:
        tp_size: ranks of tensor parallelism that the server will run with.
    """

    tp_size: int = 1
    name: ClassVar[str] = "sglang-scales"
    reads: ClassVar[tuple[str, ...]] = ("run",)
    names: ClassVar[tuple[str, ...]] = ("kv_cache_scales.json",)

    def files(self, facts: Facts) -> dict[str, bytes]:
        """See `Export.files`."""
        known = {layer.index: layer.shared_scale for layer in facts.layers}
        # 1.0 is what SGLang takes where it is told nothing.
        scales = {str(i): known.get(i) or 1.0 for i in range(facts.model.num_hidden_layers)}
        body = {
            "model_type": facts.model.model_type,
            "kv_cache": {
                "dtype": "float8_e4m3fn",
                "scaling_factor": {str(rank): scales for rank in range(self.tp_size)},
            },
        }
        return {self.names[0]: render(body)}

    def notes(self, facts: Facts) -> list[str]:
        """See `Export.notes`."""
        absent = missing_layers(facts)
        return [
            f"start the server with --kv-cache-dtype fp8_e4m3 --tp-size {self.tp_size} --quantization-param-path and "
            "this file; SGLang falls back to scales of 1, with a line in its log, if the sizes differ",
            *([f"not calibrated, so their scale is 1: {absent}"] if absent else []),
            "keys and values of a layer share a scale there; this is FP8, and holds nothing of the codebooks",
        ]
