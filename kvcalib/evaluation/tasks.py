"""lm-evaluation-harness on the caches of a contender: every pass of a task reads what the cache stored.

    with PackedLM(model, tokenizer, contender=contender) as lm:
        lm_eval.simple_evaluate(lm, tasks=["hellaswag"])
    lm.attached_calls, lm.cache_bytes     # that it really happened

HFLM, the harness' own model, calls `model(ids)` for log-likelihoods and `model.generate(ids)` for answers, without a
cache in either. `PackedLM` gives both a fresh cache of the contender, and watches every forward pass of the model: one
that reads another cache, or none, raises `CacheBypassed`.

HFLM pads a batch, on the right for log-likelihoods and without a mask. Padding would take part in what a cache does
with its last tokens: recent windows, groups of tokens that share a scale, eviction. So rows of one length go together,
and nothing is padded; a batch gives what its rows give alone.

Needs the extra `eval` (lm-eval). Importing this module registers the model as `kvcalib` with the harness:
`simple_evaluate("kvcalib", model_args={"pretrained": ..., "artifact": ...})`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvcalib.errors import CacheBypassed, InputError
from kvcalib.evaluation.contender import ArtifactContender, Contender, Unquantized
from kvcalib.evaluation.trials import Session
from kvcalib.model.loading import input_device, load_model, load_tokenizer
from kvcalib.runtime.loader import load


@register_model("kvcalib")
class PackedLM(HFLM):
    """A model on a contender's caches, for the harness. It holds them until `close`, or the end of a `with`.

    Args:
        pretrained: a loaded causal LM, or the name of one. tokenizer: its own by default, where a name is given.
        artifact: folder or Hub id; short for a contender. With neither the model runs unquantized.
        contender: whose caches are used.
        dtype, device: of a model that is named.
        batch_size: rows of a pass, at most; a number.
        more: what HFLM takes beside these.

    Attributes:
        attached_calls: forward passes, each seen to read a cache of the contender.
        cached_tokens: tokens that went into these caches, over all rows.
        cache_bytes: of the caches after each call, summed; by the contender's own count.

    Raises:
        InputError: settings that do not go together. UnsupportedModel, ArtifactMismatch: as `kvcalib.attach`.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str,
        tokenizer: Any = None,
        artifact: str | None = None,
        contender: Contender | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str | None = 1,
        **more: Any,
    ) -> None:
        if artifact is not None and contender is not None:
            raise InputError("artifact and contender are both given; give one of the two")
        rows = str(batch_size or 1)
        if not rows.isdigit() or int(rows) < 1:
            raise InputError(
                f"batch_size is {batch_size!r}, expected a number of 1 or more: rows of one length are few"
            )
        if isinstance(pretrained, str):
            named = tokenizer if isinstance(tokenizer, str) else pretrained
            tokenizer = load_tokenizer(named) if tokenizer is None or isinstance(tokenizer, str) else tokenizer
            pretrained = load_model(pretrained, dtype, "auto" if device in (None, "cuda") else device)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=int(rows), **more)
        self._device = input_device(self.model)  # HFLM takes the weights' own, which is meta where they are offloaded
        self.attached_calls = self.cached_tokens = 0
        self.cache_bytes = 0.0
        self.contender = contender or (ArtifactContender(load(artifact)) if artifact else Unquantized())
        self._given: DynamicCache | None = None
        self._open = contextlib.ExitStack()
        self._session: Session = self._open.enter_context(self.contender.run(self.model))
        watch = self.model.register_forward_pre_hook(self._watch, with_kwargs=True)
        self._open.callback(watch.remove)

    def close(self) -> None:
        """Give the model back as it was."""
        self._open.close()

    def __enter__(self) -> PackedLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the model."""
        cache = kwargs.get("past_key_values")
        if cache is None or cache is not self._given:
            found = "none" if cache is None else f"another {type(cache).__name__}"
            raise CacheBypassed(
                f"tasks: a forward pass of {type(module).__name__} was given {found} in place of the cache of "
                f"{self.contender.name!r}; its figures would be those of another cache"
            )
        self.attached_calls += 1

    @contextlib.contextmanager
    def _cache(self, rows: int, tokens: int) -> Any:
        """A fresh cache for one call; afterwards it must hold at least `tokens` of each of `rows`."""
        calls, cache = self.attached_calls, self._session.new_cache()
        self._given = cache
        try:
            yield cache
        finally:
            self._given = None
        seen = int(cache.get_seq_length())
        if self.attached_calls == calls or seen < tokens:
            raise CacheBypassed(
                f"tasks: the cache of {self.contender.name!r} has seen {seen} tokens in "
                f"{self.attached_calls - calls} passes of a call of {tokens}; its figures would be another cache's"
            )
        self.cached_tokens += rows * seen
        self.cache_bytes += self.contender.nbytes(cache)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of `inps [B, T]`, rows of one length, read off a fresh cache as it was stored."""
        attachment = self._session.attachment
        if attachment is not None:  # an exact prefill would show the unquantized model's figures
            attachment.prefill = "quantized"
        try:
            with torch.no_grad(), self._cache(*inps.shape) as cache:
                logits: Tensor = self.model(input_ids=inps, past_key_values=cache).logits
        finally:
            if attachment is not None:
                attachment.prefill = self._session.prefill
        return logits

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As HFLM's, rows of one length at a time."""
        lengths: dict[int, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            lengths.setdefault(min(len(context) + len(continuation), self.max_length + 1), []).append(place)
        found: dict[int, tuple[float, bool]] = {}
        for _, places in sorted(lengths.items(), reverse=True):
            # HFLM takes `override_bs` for a size to fall back on; what it is given here need not be that many.
            answers = super()._loglikelihood_tokens([requests[i] for i in places], True, override_bs)
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's, without its bar."""
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        """Prompts and answers `[B, T]` of `context`, left-padded; rows of one length at a time, without padding."""
        mask = generation.pop("attention_mask", None)
        width, rows = context.shape[1], len(context)
        real = [width] * rows if mask is None else mask.sum(1).tolist()
        answers: dict[int, Tensor] = {}
        for length in sorted(set(real), reverse=True):
            places = [i for i, count in enumerate(real) if count == length]
            part = context[places, width - length :]
            with self._cache(*part.shape) as cache:
                out = super()._model_generate(
                    part,
                    max_length - (width - length),
                    stop,
                    attention_mask=torch.ones_like(part),
                    past_key_values=cache,
                    **generation,
                )
            answers.update(zip(places, out[:, length:], strict=True))
        longest = max(len(answer) for answer in answers.values())
        whole = context.new_full((rows, width + longest), self.tokenizer.pad_token_id)
        whole[:, :width] = context
        for place, answer in answers.items():
            whole[place, width : width + len(answer)] = answer
        return whole


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """`task/metric` to value, out of what `simple_evaluate` returns; a filter other than `none` is named too."""
    found: dict[str, float] = {}
    for task, measured in results["results"].items():
        for name, value in measured.items():
            metric, _, kind = str(name).partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and kind:
                found[f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")] = float(value)
    return found
