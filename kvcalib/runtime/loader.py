"""Putting an artifact to work: `load`, `attach`, `detach`, `Artifact.new_cache`.

artifact = kvcalib.load("artifacts/llama3-8b-nuq3")
kvcalib.attach(model, artifact)
model.generate(...)          # runs on a packed cache, nothing else changes
kvcalib.detach(model)
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kvcalib.artifact import hub, store
from kvcalib.artifact.manifest import Manifest, TensorSpec
from kvcalib.errors import ArtifactMismatch, UnsupportedModel
from kvcalib.files import hash_bytes
from kvcalib.model import selftest
from kvcalib.model.identity import HARD, SOFT, ModelIdentity, identify
from kvcalib.model.loading import execution_device
from kvcalib.model.rotary import Rotation
from kvcalib.model.taps import AttentionOutput, Call, Tap, Taps, find_attention
from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import Codebook
from kvcalib.quant.feedback import Feedback
from kvcalib.quant.packing import Layout
from kvcalib.quant.quantizer import Quantizer
from kvcalib.runtime.adaptive import AdaptiveLayer
from kvcalib.runtime.attention import attend_packed
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.evicting import EvictingLayer
from kvcalib.runtime.eviction import Eviction, Per
from kvcalib.runtime.layers import ExactLayer, PackedLayer, TapLayer, with_exact
from kvcalib.runtime.policies import Policy, QHitter
from kvcalib.runtime.saved import Origin, Place, restore
from kvcalib.runtime.tiers import Adaptive, load_adaptive

Prefill = Literal["quantized", "exact"]
PREFILLS: tuple[Prefill, ...] = ("quantized", "exact")
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()
"""Weak on both sides: the model's own hooks keep its attachment, and nothing here keeps the model."""


@dataclass
class Artifact:
    """A loaded artifact: its manifest and the quantizers of its layers."""

    manifest: Manifest
    quantizers: dict[int, dict[str, Quantizer]]
    path: Path | None = None
    _fits: weakref.WeakKeyDictionary[nn.Module, ModelIdentity] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )

    def check_fit(self, model: PreTrainedModel) -> None:
        """See the function `check_fit`; a model is looked at once."""
        if model not in self._fits:
            self._fits[model] = check_fit(self, model)

    def new_cache(
        self,
        model: PreTrainedModel,
        sinks: int | None = None,
        recent: int | None = None,
        adaptive: Adaptive | None = None,
        eviction: Eviction | None = None,
    ) -> PackedCache:
        """An empty packed cache for `model`, which must be attached when the cache is used.

        Args:
            sinks, recent: exact first and last tokens; the artifact's defaults if None.
            adaptive: see `attach`.
            eviction: how many tokens stay, and which; layers with a sliding window have their own rule.

        Raises:
            ArtifactMismatch: the artifact, or `adaptive`, was built for another model, or the artifact lacks what the
                eviction's policy asks for. ValueError: the eviction's settings do not fit the model or the artifact.
        """
        self.check_fit(model)
        if adaptive is not None:
            adaptive.check_fit(self.quantizers)
        default = self.manifest.runtime
        sinks = default.sinks if sinks is None else sinks
        recent = default.recent if recent is None else recent
        if sinks < 0 or recent < 0:
            raise ValueError(f"sinks is {sinks} and recent is {recent}, expected counts of 0 or more")
        windows = selftest.attention_layers(model)
        weights: dict[int, tuple[float, float]] = {}
        if eviction is not None:
            eviction = eviction.within(longest_context(model))
            weights = self.weights(eviction, [index for index in self.quantizers if windows[index] is None])
        layers: dict[int, TapLayer] = {}
        for index, pair in self.quantizers.items():
            if windows[index] is not None or (adaptive is None and eviction is None):
                layers[index] = PackedLayer(pair["key"], pair["value"], sinks, recent, windows[index])
            elif adaptive is not None:
                layers[index] = adaptive.layer(index, sinks, recent, eviction, *weights.get(index, ()))
            elif eviction is not None:
                layers[index] = EvictingLayer(pair["key"], pair["value"], eviction, *weights[index], sinks, recent)
        origin = Origin(
            artifact=self.path.name if self.path else "",
            artifact_sha256=hash_bytes(self.manifest.encode()),
            model=self._fits[model],
            dtype=str(model.dtype).removeprefix("torch."),
            sinks=sinks,
            recent=recent,
            eviction=None if eviction is None else eviction.describe(),
            adaptive=None if adaptive is None else adaptive.describe(),
        )
        return PackedCache(model.config, layers, origin)

    def weights(self, eviction: Eviction, layers: list[int]) -> dict[int, tuple[float, float]]:
        """The weight of attention and the share of the tokens (1 on average) of the layers that evict.

        Raises:
            ArtifactMismatch: the policy asks for a weight, and the artifact has none.
        """
        if not eviction.rule.weighted:
            # Policies of others are measured as they are: the same number of tokens in every layer.
            return dict.fromkeys(layers, (1.0, 1.0))
        alphas, shares = dict.fromkeys(layers, 1.0), dict.fromkeys(layers, 1.0)
        for spec in self.manifest.layers:
            found = spec.friendliness
            if spec.index not in alphas:
                continue
            if found is not None and found.share is not None:
                shares[spec.index] = found.share
            if found is not None and found.alpha is not None:
                alphas[spec.index] = found.alpha
            elif eviction.alpha is None:
                where = f"artifact {str(self.path)!r}" if self.path else "the artifact"
                raise ArtifactMismatch(
                    f"{where}: layer {spec.index} has no friendliness.alpha, which policy {eviction.rule.name!r} "
                    "weights attention with; build it anew from a calibration of this version, give an alpha, or take "
                    "another policy (h2o, window)"
                )
        shares = eviction.shared(shares)
        return {layer: (alphas[layer], shares[layer]) for layer in layers}

    def load_cache(
        self,
        path: str | Path,
        model: PreTrainedModel,
        sinks: int | None = None,
        recent: int | None = None,
        cache: PackedCache | None = None,
    ) -> PackedCache:
        """The cache that `PackedCache.save` wrote to `path`, ready for `model` to go on from.

        Args:
            sinks, recent: as the cache was made with; the artifact's defaults if None.
            cache: an empty one of `new_cache` with the settings that the saved one had, in place of `sinks`, `recent`.

        Raises:
            ArtifactMismatch: it was saved from another artifact, model, dtype or setting; names both.
            CorruptFile: it is damaged. InputError: there is none.
        """
        cache = self.new_cache(model, sinks, recent) if cache is None else cache
        places = {i: Place(execution_device(m), *kv_shape(model, i)) for i, m in find_attention(model).items()}
        restore(cache, Path(path), places)
        return cache


def load(path: str | Path, revision: str | None = None) -> Artifact:
    """Load an artifact from a folder or the Hub; every hash is checked.

    Raises:
        InputError: there is none. CorruptFile: it is damaged or of an unknown version.
    """
    folder = hub.locate(path, revision)
    manifest, tensors = store.read(folder)
    quantizers = {}
    for layer in manifest.layers:
        quantizers[layer.index] = {
            name: _quantizer(spec, name == "value" and not spec.basis, f"layers.{layer.index}.{name}", tensors)
            for name, spec in (("key", layer.key), ("value", layer.value))
        }
    return Artifact(manifest, quantizers, folder)


def _quantizer(spec: TensorSpec, relative: bool, prefix: str, tensors: dict[str, Tensor]) -> Quantizer:
    """One quantizer of tensors that `store.read` has checked."""
    widths = tensors[f"{prefix}.widths"]
    layout = Layout(widths, tensors[f"{prefix}.word"], tensors[f"{prefix}.shift"], spec.words, spec.segment)
    codebook = Codebook.from_ragged(tensors[f"{prefix}.codebook"], widths)
    feedback = Feedback(widths, tensors[f"{prefix}.feedback"]) if spec.feedback else None
    basis = Basis(tensors[f"{prefix}.basis"]) if spec.basis else None
    weight = tensors[f"{prefix}.weight"]
    return Quantizer(codebook, layout, relative, spec.scope, spec.outliers, weight, feedback, basis)


def check_fit(artifact: Artifact, model: PreTrainedModel) -> ModelIdentity:
    """`model`'s identity; ArtifactMismatch unless the artifact fits it; a warning if its weights are others."""
    expected, found = artifact.manifest.model, identify(model)
    where = f"artifact {str(artifact.path)!r}" if artifact.path else "the artifact"
    for difference in expected.differences(found, HARD):
        raise ArtifactMismatch(f"{where} was built for {expected.name!r}: this model's {difference}; build one for it")
    stock = selftest.attention_layers(model)
    for layer in artifact.manifest.layers:
        if layer.index not in stock:
            raise ArtifactMismatch(
                f"{where} quantizes layer {layer.index}, which in this model keeps no keys and values of its own "
                f"(layers that do: {sorted(stock)}); build one for it"
            )
        for role, spec in (("key", layer.key), ("value", layer.value)):
            for name, found_size in zip(("kv_heads", "head_dim"), kv_shape(model, layer.index), strict=True):
                if getattr(spec, name) != found_size:
                    raise ArtifactMismatch(
                        f"{where}: layers[{layer.index}].{role}.{name} is {getattr(spec, name)}, this model has "
                        f"{found_size}; build one for it"
                    )
    for name in SOFT:
        if expected.differences(found, (name,)):
            hint = "a fine-tuned or differently loaded model may be served with it, but measure it with `kvcalib eval`"
            warnings.warn(
                f"{where} was calibrated on other {SOFT[name]} than this model's ({name}); {hint}", stacklevel=4
            )
    return found


def kv_shape(model: PreTrainedModel, layer: int) -> tuple[int, int]:
    """`(kv heads, head_dim)` of one layer, from the config."""
    config: Any = model.config.get_text_config(decoder=True)
    config = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    heads = config[layer].num_attention_heads
    kv_heads = getattr(config[layer], "num_key_value_heads", None) or heads
    return kv_heads, getattr(config[layer], "head_dim", None) or config[layer].hidden_size // heads


def longest_context(model: PreTrainedModel) -> int | None:
    """The longest context that the model's config names, None if none."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


class _PackedAttention:
    """Handler of an attached model: cached attention on packed or exact layers.

    Args:
        exact_prefill: tokens of a pass that brings several attend to one another exactly, and only to what was there
            before as it was stored.
    """

    def __init__(self, exact_prefill: bool = False) -> None:
        self.exact_prefill = exact_prefill

    @torch.compiler.disable
    def before(self, tap: Tap) -> None:
        """Tell the cache which of the new tokens are real."""
        if not isinstance(tap.cache, PackedCache):
            raise ValueError(
                f"the attached model was given a {type(tap.cache).__name__} as past_key_values; "
                "pass artifact.new_cache(model), or nothing, or call kvcalib.detach(model) first"
            )
        tap.cache.expect(tap.layer, valid_tokens(tap.mask))

    @torch.compiler.disable
    def attend(self, call: Call) -> AttentionOutput:
        """Attention over everything that the layer shows."""
        cache, tap = call.tap.cache, call.tap
        layer = cache.layers[tap.layer]
        new, current = call.query.shape[2], new_positions(call, layer)
        if isinstance(layer, EvictingLayer):
            return layer.attend(call, current, self.exact_prefill), None
        count = layer.visible(new)
        positions = cache.extend_positions(layer.seen, current)
        if count < layer.seen:
            positions = positions[:, layer.seen - count :]
        if isinstance(layer, ExactLayer):
            key, value = layer.read(count)
            return call.plain(call.rotate_new(call.query), call.rotate_at(key, positions), value)
        if isinstance(layer, AdaptiveLayer):
            return layer.attend(call, call.rotate_new(call.query), positions), None
        if self.exact_prefill and new > 1:
            if count == new:
                return call.plain(call.rotate_new(call.query), call.rotate_new(call.key), call.value)
            return attend_packed(call, with_exact(layer.view(count, positions), call.key, call.value)), None
        return attend_packed(call, layer.view(count, positions)), None


def new_positions(call: Call, layer: TapLayer) -> Tensor:
    """Positions `[B or 1, Q]` of the tokens that came, which `layer` has counted; in order where nothing is rotated."""
    if call.tap.rotary is not None:
        return call.tap.rotary.position_ids
    return torch.arange(layer.seen - call.query.shape[2], layer.seen, device=call.query.device)[None]


def valid_tokens(mask: Tensor | None) -> Tensor | None:
    """Which of the new tokens are real, `[B, Q]` bool, read off the last query's row of the mask."""
    if mask is None or mask.ndim != 4:
        return None
    last = mask[:, 0, -1, -mask.shape[2] :]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


@dataclass
class Attachment:
    """An artifact at work in a model."""

    model: PreTrainedModel
    artifact: Artifact
    taps: Taps
    sinks: int | None
    recent: int | None
    adaptive: Adaptive | None = None
    eviction: Eviction | None = None
    handles: list[Any] = field(default_factory=list)

    @property
    def prefill(self) -> Prefill:
        """How the tokens of a pass that brings several see each other; see `attach`. May be set between passes."""
        return "exact" if self._handler.exact_prefill else "quantized"

    @prefill.setter
    def prefill(self, value: Prefill) -> None:
        if value not in PREFILLS:
            raise ValueError(f"prefill is {value!r}, expected one of {PREFILLS}")
        self._handler.exact_prefill = value == "exact"

    @property
    def _handler(self) -> _PackedAttention:
        assert isinstance(self.taps.handler, _PackedAttention)
        return self.taps.handler

    def make_cache(self) -> PackedCache:
        """An empty cache with the attachment's settings."""
        return self.artifact.new_cache(self.model, self.sinks, self.recent, self.adaptive, self.eviction)

    @contextlib.contextmanager
    def bypass(self) -> Iterator[None]:
        """Run the model unquantized for a while."""
        with self.taps.bypass():
            yield

    def install(self) -> None:
        """Give every forward pass and every `generate` without a cache of its own a packed one."""
        model: Any = self.model
        prepare = model._prepare_cache_for_generation

        def prepare_packed(config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.taps.enabled and model_kwargs.get("past_key_values") is None and config.use_cache is not False:
                if config.cache_implementation is not None:
                    warnings.warn(
                        f"cache_implementation is {config.cache_implementation!r}: the attached model uses its "
                        "packed cache",
                        stacklevel=2,
                    )
                    config.cache_implementation = None
                model_kwargs["past_key_values"] = self.make_cache()
                result = prepare(config, model_kwargs, *args, **kwargs)
                model_kwargs["past_key_values"]._is_user_defined = False
                if getattr(config, "is_assistant", False):
                    # What `prepare` does for the caches it makes: rejected drafts are cropped off again.
                    model_kwargs["past_key_values"].activate_past_recording()
                return result
            return prepare(config, model_kwargs, *args, **kwargs)

        model._prepare_cache_for_generation = prepare_packed
        self.handles.append(model.register_forward_pre_hook(self._give_cache, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._take_back))

    @torch.compiler.disable
    def _give_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Also with use_cache=False: attention then reads a packed cache that lives for this one call.
        if not self.taps.enabled or kwargs.get("past_key_values") is not None or len(args) > 3:
            return None
        cache = self.make_cache()
        wanted = kwargs.get("use_cache")
        if wanted is False or (wanted is None and self.model.config.get_text_config(decoder=True).use_cache is False):
            cache.lent = True
        return args, kwargs | {"past_key_values": cache}

    @torch.compiler.disable
    def _take_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # `generate(use_cache=False)` would go on with a cache that it finds in the output.
        parts = output.values() if isinstance(output, ModelOutput) else output
        if not any(_is_lent(part) for part in parts):
            return None
        if isinstance(output, ModelOutput):
            return type(output)(**{name: part for name, part in output.items() if not _is_lent(part)})
        return tuple(part for part in output if not _is_lent(part))

    def remove(self) -> None:
        """Undo `install` and take the taps off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        self.taps.remove()


def _is_lent(part: Any) -> bool:
    return isinstance(part, PackedCache) and part.lent


def attachment_of(model: nn.Module) -> Attachment | None:
    """What `attach` returned for `model`, None if it is not attached."""
    found = _ATTACHED.get(model)
    return None if found is None else found()


def attach(
    model: PreTrainedModel,
    artifact: Artifact | str | Path,
    sinks: int | None = None,
    recent: float | None = None,
    rotations: dict[int, Rotation] | None = None,
    prefill: Prefill = "quantized",
    adaptive: Adaptive | str | Path | None = None,
    keep: float | None = None,
    policy: str | Policy = "qhitter",
    streaming: bool = False,
    age_norm: bool = True,
    per: Per = "auto",
    eviction: Eviction | None = None,
) -> Attachment:
    """Make `model` run on packed caches of `artifact` until `detach`.

    Args:
        artifact: a loaded artifact, its folder or its Hub id.
        sinks, recent: exact first and last tokens; the artifact's defaults if None. With `keep`, `recent` is how many
            of the last tokens always stay (packed), below 1 a share of the tokens seen; a quarter of `keep` if None.
        rotations: what `prove` returned for this model and these layers, to skip the self-test.
        prefill: "quantized": every query reads what the cache stored, the prompt's own tokens included. "exact": the
            tokens of a pass that brings several (a prompt, a chunk of one) see each other exactly and are read as
            stored from the next pass on; faster, and the prompt's hidden states carry less error.
        adaptive: a width for each token by the attention that it drew, in place of the artifact's
            (`runtime/adaptive.py`); what `load_adaptive` gives, or the folder that `kvcalib tiers` wrote. Layers with a
            sliding window keep the artifact's widths. The tokens of a pass then always see each other exactly, and at
            least the last `adaptive.rule.window` tokens stay exact.
        keep: at most so many tokens stay, below 1 a share of the tokens seen; see `eviction.Eviction`.
        policy: which: "qhitter", "h2o", "window", "qhitter-published", "full", or a `Policy` of your own.
        streaming: positions are counted within the cache, so that generation can go on without end.
        age_norm: "qhitter" compares attention per query, not its sum, which favours old tokens.
        per: "head", "layer" or "auto": whether each KV head keeps its own tokens.
        eviction: all of this at once, in place of `keep` and what follows it.

    Raises:
        UnsupportedModel: the self-test failed. ArtifactMismatch: the artifact is another model's, or lacks what the
            policy asks for. ValueError: settings that do not go together.
        RuntimeError: the model is attached already.
    """
    if attachment_of(model) is not None:
        raise RuntimeError("the model is attached already; call kvcalib.detach(model) first")
    loaded = artifact if isinstance(artifact, Artifact) else load(artifact)
    loaded.check_fit(model)
    if not loaded.quantizers:
        raise UnsupportedModel(f"artifact {str(loaded.path)!r} quantizes no layer; there is nothing to attach")
    if rotations is None:
        rotations = prove(model, list(loaded.quantizers))
    if prefill not in PREFILLS:
        raise ValueError(f"prefill is {prefill!r}, expected one of {PREFILLS}")
    if adaptive is not None:
        adaptive = adaptive if isinstance(adaptive, Adaptive) else load_adaptive(adaptive)
        adaptive.check_fit(loaded.quantizers)
    if eviction is None and keep is not None:
        if policy == "qhitter" and not age_norm:
            policy = QHitter(age_norm=False)
        eviction, recent = Eviction(keep, recent, policy, streaming, per), None
    elif streaming or (recent is not None and recent != int(recent)):
        raise ValueError(
            f"streaming is {streaming} and recent {recent}, but there is no keep; say how many tokens stay, as keep=0.2"
        )
    last = None if recent is None else int(recent)
    taps = Taps(model, _PackedAttention(prefill == "exact"), rotations)
    attachment = Attachment(model, loaded, taps, sinks, last, adaptive, eviction)
    try:
        # Settings that do not fit are refused now and not by the first forward pass.
        attachment.make_cache()
    except Exception:
        taps.remove()
        raise
    attachment.install()
    _ATTACHED[model] = weakref.ref(attachment)
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; nothing happens if the model is not attached."""
    attachment = attachment_of(model)
    if attachment is not None:
        del _ATTACHED[model]
        attachment.remove()


def load_cache(path: str | Path, model: PreTrainedModel) -> PackedCache:
    """The cache that `PackedCache.save` wrote to `path`, for the attached `model`; see `Artifact.load_cache`.

    Raises:
        RuntimeError: the model is not attached.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise RuntimeError("the model is not attached; call kvcalib.attach(model, artifact) before load_cache")
    made = attachment.make_cache()
    return attachment.artifact.load_cache(path, model, cache=made)


def prove(model: PreTrainedModel, layers: list[int]) -> dict[int, Rotation]:
    """Self-test of `layers`: find their rotations, then compare logits bit by bit (see `model/selftest.py`).

    Raises:
        UnsupportedModel: with the reason.
    """
    rotations = selftest.find_rotations(model, layers)
    selftest.check_exact(model, lambda: exact_cache(model, layers), lambda: Taps(model, _PackedAttention(), rotations))
    return rotations


def exact_cache(model: PreTrainedModel, layers: list[int]) -> PackedCache:
    """A cache that keeps `layers` exact but un-rotated, as the self-test needs it."""
    windows = selftest.attention_layers(model)
    return PackedCache(model.config, {layer: ExactLayer(windows[layer]) for layer in layers})
