"""What a cache gives back, as a differentiable function of its centroids.

`Quantizer.encode` chooses codes, outliers, zeros and scales by the present centroids, exactly as the cache does; what
they decode to is written out in operations that autograd follows, with c the centroids of a channel:

    x^ = c[code]              relative:  x^ = zero + scale * c[code]              outliers:  x^ = x

Values in a basis of their own are turned forth before and back after that.

The choice has no derivative. With respect to x, x^ counts as x itself (the straight-through estimator, Bengio et al.,
arXiv 1308.3432): so the gradient of a later layer's error reaches the centroids of the layers before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcalib.artifact.check import LARGEST_CENTROID
from kvcalib.model.taps import AttentionOutput, Call, Tap
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.quantizer import Quantizer


class Centroids:
    """The centroids of one layer's keys or values while they are learned; all else of their quantizer stays.

    Attributes:
        values: float32 `[sum 2**width]`, ragged as in an artifact, with a gradient. Changed in place only.
        channel: int64, for each of them the channel `h * D + d` that it belongs to.
    """

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self._quantizer = quantizer
        sizes = 1 << quantizer.layout.widths.flatten().long()
        first = sizes.cumsum(0) - sizes
        self._first = first.to(device)
        self.channel = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)
        self._rank = torch.arange(int(sizes.sum())).to(device) - self._first[self.channel]
        self._size = int(sizes.max())
        self.values = quantizer.codebook.ragged().to(device).requires_grad_()
        self._present: tuple[int, Quantizer] | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of the present centroids."""
        version = self.values._version
        if self._present is None or self._present[0] != version:
            ragged = self.values.detach().cpu().clone()
            codebook = Codebook.from_ragged(ragged, self._quantizer.layout.widths)
            self._present = (version, replace(self._quantizer, codebook=codebook))
        return self._present[1]

    def stored(self, x: Tensor, exact_dtype: torch.dtype) -> Tensor:
        """`x [N, H, D]` as it comes back from storage, float32; see the module for its derivatives."""
        quantizer = self.quantizer
        with torch.no_grad():
            rows = quantizer.encode(quantizer.along(x.detach()), exact_dtype)
            codes = quantizer.layout.unpack(rows["words"]).flatten(1)
        # index_select, since the gradient of an index is not summed in one order by several threads.
        decoded = self.values.index_select(0, (codes + self._first).flatten())
        grouped = decoded.view(len(x), quantizer.groups, -1)
        if quantizer.relative:
            grouped = torch.addcmul(rows["zero"].float()[..., None], rows["scale"].float()[..., None], grouped)
        if quantizer.outliers:
            grouped = grouped.scatter(-1, rows["outlier_index"].long(), rows["outlier_value"].float())
        decoded, wide = grouped.reshape(x.shape), x.float()
        if quantizer.basis is not None:
            decoded = quantizer.basis.rows_back(decoded)
        return decoded + (wide - wide.detach())

    def error(self, x: Tensor) -> Tensor:
        """Root mean square of what storing takes from each channel of `x [N, H, D]`, in units of the codebook.

        Returns:
            float32 `[H * D]`, along the quantizer's basis; of a relative codebook as a share of the group's scale.
        """
        quantizer = self.quantizer
        exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
        with torch.no_grad():
            x = quantizer.along(x)
            rows = quantizer.encode(x, exact)
            lost = (x.float() - quantizer.decode(rows)).reshape(len(x), quantizer.groups, -1)
            if quantizer.relative:
                scale = rows["scale"].float()[..., None]
                lost = lost / torch.where(scale > 0, scale, 1.0)
            return lost.reshape(len(x), -1).square().mean(0).sqrt()

    def settle(self, *beside: Tensor) -> None:
        """Put every channel's centroids in ascending order, within what an artifact holds, in place.

        Args:
            beside: numbers of each centroid that move along with it, in place.
        """
        with torch.no_grad():
            self.values.clamp_(-LARGEST_CENTROID, LARGEST_CENTROID)
            table = self.values.new_full((len(self._first), self._size), torch.inf)
            table[self.channel, self._rank] = self.values
            order = table.sort(dim=1, stable=True).indices[self.channel, self._rank]
            moved = self._first[self.channel] + order
            for numbers in (self.values, *beside):
                numbers.copy_(numbers[moved])


@dataclass(eq=False)
class StoredAttention:
    """Handler of a tapped model: attention over what a packed cache gives back of the tokens of one pass.

    The pass is that of `evaluation/perplexity.py`, its prompt quantized: the first tokens of a sequence and its recent
    window are exact, all queries read all others as stored. Attention itself is the model's own, in its dtype.

    Attributes:
        layers: "key" and "value" of every tapped layer.
        sinks: of each layer, first tokens of a sequence that stay exact. recent: last tokens that do.
    """

    layers: Mapping[int, Mapping[str, Centroids]]
    sinks: Mapping[int, int]
    recent: int

    def before(self, tap: Tap) -> None:
        """Nothing to prepare."""

    def attend(self, call: Call) -> AttentionOutput:
        """The model's own attention, over keys and values as stored."""
        layer = call.tap.layer
        key, value = self._read(call.key, layer, "key"), self._read(call.value, layer, "value")
        return call.plain(call.rotate_new(call.query), call.rotate_new(key), value)

    def part(self, x: Tensor, layer: int) -> slice:
        """Which tokens of `x [B, H, T, D]` are stored, and not exact."""
        sinks = self.sinks[layer]
        return slice(sinks, max(sinks, x.shape[2] - self.recent))

    def _read(self, x: Tensor, layer: int, role: str) -> Tensor:
        """`x [B, H, T, D]` as attention reads it."""
        stored, exact = self.part(x, layer), torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
        rows = x[:, :, stored].transpose(1, 2)
        back = self.layers[layer][role].stored(rows.flatten(0, 1), exact).to(x.dtype).view(rows.shape)
        return torch.cat([x[:, :, : stored.start], back.transpose(1, 2), x[:, :, stored.stop :]], 2)
