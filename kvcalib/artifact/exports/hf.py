"""`--to hf`: a `cache_config` of transformers' own quantized cache, of about the artifact's bits.

It is a stand-in where kvcalib cannot be installed, not the same quantizer: uniform steps, one width for all, no
calibration, no outliers, and exact tokens at prefill (docs/footguns.md, 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcalib.artifact.exports.export import Export, Facts, render
from kvcalib.errors import InputError

WIDTHS = {"hqq": (2, 3, 4, 8), "quanto": (2, 4)}
"""Code widths that transformers 5.23 takes, by backend; not hqq's 1 bit, whose error is larger than the keys."""
AXIS = 0
"""Groups of elements that lie far apart. Groups within a token and head (1, or -1 for quanto) fail at most prompt
lengths: quanto 0.2.7 and hqq 0.2.8 then want numbers of tokens that their packing divides (docs/LOG.md)."""
GROUPS = (64, 32, 16)
RESIDUAL = 128
SCALE_BITS = 32
"""Scale and zero point of a group, 16 bits each."""


@dataclass(frozen=True)
class TransformersCache(Export):
    """`cache_config` of `generate(cache_implementation="quantized")`.

    Attributes:
        backend: "hqq" or "quanto", the package that must be installed with transformers.
    """

    backend: str = "hqq"
    name: ClassVar[str] = "hf"
    reads: ClassVar[tuple[str, ...]] = ("artifact",)
    names: ClassVar[tuple[str, ...]] = ("cache_config.json",)

    def config(self, facts: Facts) -> dict[str, str | int]:
        """The keyword arguments of transformers' `QuantizedCache`, `config` left out.

        Raises:
            InputError: an unknown backend, or a layer with a sliding window, which that class refuses.
        """
        if self.backend not in WIDTHS:
            raise InputError(f"--backend is {self.backend!r}, expected one of {', '.join(WIDTHS)}")
        sliding = [layer.index for layer in facts.layers if layer.sliding is not None]
        if sliding:
            raise InputError(
                f"{facts.origin}: layer {sliding[0]} has a sliding window, and transformers' QuantizedCache refuses "
                "models with such layers; serve this artifact with kvcalib instead"
            )
        head_dims = {layer.head_dim for layer in facts.layers}
        group = next((g for g in GROUPS if all(d % g == 0 for d in head_dims)), None)
        if group is None:
            raise InputError(
                f"{facts.origin}: head_dim is {', '.join(map(str, sorted(head_dims)))}, and no group of "
                f"{' or '.join(map(str, GROUPS))} divides it; serve this artifact with kvcalib instead"
            )
        wanted = mean_width(facts)
        nbits = min(WIDTHS[self.backend], key=lambda bits: (abs(bits - wanted), -bits))
        return {
            "backend": self.backend,
            "nbits": nbits,
            "axis_key": AXIS,
            "axis_value": AXIS,
            "q_group_size": group,
            "residual_length": max(RESIDUAL, facts.recent),
        }

    def files(self, facts: Facts) -> dict[str, bytes]:
        """See `Export.files`."""
        return {self.names[0]: render(self.config(facts))}

    def notes(self, facts: Facts) -> list[str]:
        """See `Export.notes`."""
        config = self.config(facts)
        bits = int(config["nbits"]) + SCALE_BITS / int(config["q_group_size"])
        return [
            f'model.generate(..., cache_implementation="quantized", cache_config=json.load(open("{self.names[0]}"))) '
            f"(needs the package {'hqq' if self.backend == 'hqq' else 'optimum-quanto'})",
            f"{config['nbits']} bit codes, {bits:g} bits an element with scales, stand for a mean code width of "
            f"{mean_width(facts):.2f}; lost are the fitted codebooks, the widths by channel, exact outliers and "
            "sinks where there are any, and keys before RoPE: expect a larger loss, and measure it",
        ]


def mean_width(facts: Facts) -> float:
    """Mean code width over the key and value elements of all layers."""
    elements = sum(layer.kv_heads * layer.head_dim for layer in facts.layers)
    total = sum(
        ((layer.key_bits or 0.0) + (layer.value_bits or 0.0)) * layer.kv_heads * layer.head_dim
        for layer in facts.layers
    )
    return total / (2 * elements)
