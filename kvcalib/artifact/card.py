"""The model card of an artifact, its `README.md`: for people, and for the Hub's pages.

YAML front matter, then Markdown. Names and texts in it come from users and from others' repositories: in the front
matter they are written by a YAML writer, in the text every character that Markdown or HTML would read is escaped. The
same manifest and figures give the same bytes.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import yaml

from kvcalib.artifact.manifest import Manifest, Refined, TensorSpec
from kvcalib.errors import InputError
from kvcalib.quant.quantizer import BYTE_INDEXED

TAGS = ["kv-cache", "quantization", "kvcalib"]
POSITION_BITS, WORD_BITS, EXACT_BITS = 32, 32, 16
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_MARKDOWN = re.compile(r"([\\`*_\[\]#|~$])")


@dataclass(frozen=True)
class Measured:
    """The table of a comparison: what was measured on which text, one row of texts for each contender.

    Attributes:
        protocol: one paragraph. head: names of the columns. rows: their cells, the contender's name first.
        mine: the name in `rows` that is this artifact, shown in bold.
    """

    protocol: str
    head: list[str]
    rows: list[list[str]]
    mine: str | None = None


def card(manifest: Manifest, measured: Measured | None = None, license: str | None = None) -> str:
    """The card's text.

    Raises:
        InputError: `license` is no identifier of the Hub's kind.
    """
    name = plain(manifest.model.name)
    source, fit = manifest.calibration, manifest.fit
    key, value = manifest.mean_bits
    loss = sum(layer.key.predicted_loss + layer.value.predicted_loss for layer in manifest.layers)
    asked = f", {manifest.budget.asked:g} asked for" if manifest.budget is not None else ""
    tuned = manifest.refined
    refined = "" if tuned is None else f"\n| refined | {plain(refinement(tuned))} |"
    of_all = f"{len(manifest.layers)} of {manifest.model.num_hidden_layers}"
    revision = f" (revision {plain(manifest.model.revision)})" if manifest.model.revision else ""
    parts = [
        front_matter(manifest, license),
        f"# KV-cache quantizer for {name}",
        "Codebooks and tables with which kvcalib keeps the KV cache of "
        f"{name}{revision} packed. It holds no weights: load the model as always, then attach this artifact.",
        f"""| | |
|---|---|
| effective bits of a long cache | {effective_bits(manifest):.3f}{asked} |
| code width | keys {key:.2f}, values {value:.2f} bit, {fit.format} |
| exact outliers | {exact_share(manifest)} % of a token's elements |
| kept exact by default | first {manifest.runtime.sinks} and last {manifest.runtime.recent} tokens |
| layers | {of_all} |{refined}
| predicted loss | {loss:.5f} nats per token{"" if tuned is None else ", before it was refined"} |
| made by | kvcalib {plain(manifest.producer.version)}, format version {manifest.format_version} |""",
        """## Use

```python
import kvcalib

artifact = kvcalib.load("this repository or folder")
kvcalib.attach(model, artifact)  # model: the transformers model named above
model.generate(...)
```

Every hash is checked when it is loaded, and a model of another shape is refused.""",
        "## Measured\n\n" + _table(measured)
        if measured is not None
        else "## Measured\n\nNo comparison was attached. `kvcalib eval` measures this artifact on text of your own.",
        "## Layers\n\n" + _layers(manifest),
        f"""## Calibration

Text: {plain(without_folders(source.data))}; {source.sequences} sequences of {source.seq_len} tokens,
{source.tokens} tokens in all, {source.sampled_tokens} of them kept whole, seed {source.seed}. NLL of the unquantized
model on it: {source.nll:.4f} nats per token.
Codebooks: weights {fit.weights}, keys per {fit.key_granularity}, values per {fit.value_granularity}, {fit.solver}
solver, Q-Norm {"on" if fit.qnorm else "off"}. Error feedback: {"on" if manifest.feedback else "off"}.
Values: {value_axes(manifest)}.""",
        """## Limits

- It fits one model's weights. Fine-tuned or differently scaled ones load with a warning; measure before you trust it.
- The predicted loss is a second-order estimate on the calibration text. Other text, longer contexts and other
  languages can cost more.
- Layers that are not listed keep the model's own cache, and effective bits are of a long cache: short ones hold more
  exact tokens and spare room.
- The model keeps its own license; none of its weights are in here.""",
        "`manifest.json` says everything else; kvcalib's `docs/artifact.md` specifies it.",
    ]
    return "\n\n".join(parts) + "\n"


def value_axes(manifest: Manifest) -> str:
    """How values are kept, in a few words."""
    return "along their principal axes" if manifest.basis else "as they are, with zero and scale"


def refinement(tuned: Refined) -> str:
    """What `kvcalib refine` did to an artifact, in a line."""
    return (
        f"{tuned.steps} steps on {without_folders(tuned.data)}, held-out KLD {tuned.kld_before:.6f} before, "
        f"{tuned.kld_after:.6f} after ({tuned.kld_after / tuned.kld_before - 1:+.1%})"
    )


def front_matter(manifest: Manifest, license: str | None = None) -> str:
    """The YAML between two lines of dashes; `base_model` only if the model's name can be a Hub id."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(f"--license is {license!r}, expected an identifier as the Hub lists them, such as apache-2.0")
    fields: dict[str, Any] = {"library_name": "kvcalib", "tags": TAGS}
    if license is not None:
        fields["license"] = license
    if _HUB_ID.fullmatch(manifest.model.name):
        fields["base_model"] = manifest.model.name
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=False, width=1000) + "---"


def plain(text: str) -> str:
    """`text` as it shows within a line of Markdown or HTML: no markup, links, mentions or line breaks."""
    line = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    line = " ".join(line.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def without_folders(data: str) -> str:
    """The last part of an absolute path: where a text lay on one machine is nobody's business; else `data`."""
    return data.rstrip("/").rsplit("/", 1)[-1] if data.startswith(("/", "~")) else data


def _table(measured: Measured) -> str:
    lines = ["| " + " | ".join(plain(cell) for cell in measured.head) + " |"]
    lines.append("|---" + "|--:" * (len(measured.head) - 1) + "|")
    for row in measured.rows:
        cells = [plain(cell) for cell in row]
        if row[0] == measured.mine:
            cells = [f"**{cell}**" if cell else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    # Text of others never begins a line: there "1." or "-" would be markup.
    return "Protocol: " + plain(measured.protocol) + "\n\n" + "\n".join(lines)


def _layers(manifest: Manifest) -> str:
    lines = [
        "| layer | key bits | value bits | key loss | value loss | key error | value error |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for layer in manifest.layers:
        error = layer.friendliness
        lines.append(
            f"| {layer.index} | {layer.key.mean_bits:.2f} | {layer.value.mean_bits:.2f} | "
            f"{layer.key.predicted_loss:.1e} | {layer.value.predicted_loss:.1e} | "
            + ("| |" if error is None else f"{error.key_error:.3f} | {error.value_error:.3f} |")
        )
    lines.append("\nBits are mean code widths, losses predicted nats per token, errors mean |x - x^| / |x| of a token.")
    return "\n".join(lines)


def exact_share(manifest: Manifest) -> str:
    """The outliers of all layers in percent of a token's elements, `0.78 to 2.34` where layers differ."""
    shares = []
    for spec in (spec for layer in manifest.layers for spec in (layer.key, layer.value)):
        groups = spec.kv_heads if spec.scope == "head" else 1
        shares.append(100 * spec.outliers * groups / (spec.kv_heads * spec.head_dim))
    if not shares:
        return "0"
    low, high = (f"{share:.3g}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def effective_bits(manifest: Manifest) -> float:
    """Bits per element of a long cache: as planned, or those of the listed layers' rows and of a position."""
    if manifest.budget is not None:
        return manifest.budget.planned
    specs = [pair for layer in manifest.layers for pair in ((layer.key, False), (layer.value, not layer.value.basis))]
    elements = sum(spec.kv_heads * spec.head_dim for spec, _ in specs)
    return (POSITION_BITS + sum(_row_bits(spec, relative) for spec, relative in specs)) / max(1, elements)


def _row_bits(spec: TensorSpec, relative: bool) -> int:
    """Bits of one token's row: words, outliers with their indices, zero and scale (docs/artifact.md, 5.5)."""
    groups = spec.kv_heads if spec.scope == "head" else 1
    index = 8 if spec.kv_heads * spec.head_dim // groups <= BYTE_INDEXED else 16
    bits = WORD_BITS * spec.words + groups * spec.outliers * (EXACT_BITS + index)
    return bits + 2 * EXACT_BITS * groups * relative
