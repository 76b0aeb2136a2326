"""What the soak does to a model: attachments ("ways") and uses of an attached model ("modes").

A mode takes a `Bed`, whose model is attached, and a seed, which fixes prompts, lengths and batches, and gives tensors
that are the same in every process. Prompts are random tokens: what is compared is bits, not text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import kvcalib
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.loader import Artifact
from kvcalib.runtime.tiers import load_adaptive

Found = dict[str, Tensor]
WAYS: dict[str, dict[str, Any]] = {
    "low": {"bits": "low"},
    "middle": {"bits": "middle"},
    "high": {"bits": "high"},
    "exact prefill": {"bits": "middle", "prefill": "exact"},
    "exact tokens": {"bits": "low", "sinks": 3, "recent": 8},
    "adaptive": {"bits": "low", "adaptive": "no"},
    "adaptive, host copy": {"bits": "low", "adaptive": "cpu"},
    "keep a share": {"bits": "high", "keep": 0.4},
    "keep a number": {"bits": "middle", "keep": 32, "policy": "h2o"},
    "stream": {"bits": "low", "keep": 24, "streaming": True, "policy": "window"},
}
"""Settings of `attach`; `bits` names an artifact's folder."""
PLAIN = "plain"
"""The control: nothing attached, transformers' own cache."""


class Bed:
    """A model and what it is attached with.

    Attributes:
        folder: holds the artifacts `low`, `middle`, `high` and the adaptive widths `adaptive`.
        scale: factor on the lengths of prompts and continuations.
        spare: a copy of the model that is never attached.
        kept: artifacts that stay loaded, by name.
    """

    def __init__(self, model: Any, folder: Path, scale: int = 1) -> None:
        self.model, self.folder, self.scale = model, folder, scale
        self.vocabulary = model.config.vocab_size
        self.spare = copy.deepcopy(model)
        self.assistant = shortened(model)
        self.attachment: Any = None
        self.kept: dict[str, Artifact] = {}

    def artifact(self, name: str, keep: bool = False) -> Artifact:
        """An artifact, read anew unless it was kept."""
        if name in self.kept:
            return self.kept[name]
        made = kvcalib.load(self.folder / name)
        if keep:
            self.kept[name] = made
        return made

    def attach(self, way: str, keep: bool = False, rotations: Any = None) -> None:
        if way == PLAIN:
            return
        settings = dict(WAYS[way])
        artifact = self.artifact(settings.pop("bits"), keep)
        if "adaptive" in settings:
            settings["adaptive"] = load_adaptive(self.folder / "adaptive", settings["adaptive"], every=4)
        self.attachment = kvcalib.attach(self.model, artifact, rotations=rotations, **settings)

    def detach(self) -> None:
        if self.attachment is not None:
            kvcalib.detach(self.model)
        self.attachment = None

    def cache(self) -> PackedCache | DynamicCache:
        return DynamicCache(config=self.model.config) if self.attachment is None else self.attachment.make_cache()

    def prompt(self, dice: random.Random, rows: int = 1, least: int = 12, most: int = 40) -> Found:
        """Left-padded rows of different length."""
        lengths = [dice.randint(least, most) * self.scale for _ in range(rows)]
        ids = torch.ones(rows, max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, -length:] = torch.tensor([dice.randrange(3, self.vocabulary) for _ in range(length)])
            mask[row, -length:] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def say(self, inputs: Found, dice: random.Random, model: Any = None, **settings: Any) -> Found:
        """Generate; the tokens and the logits of every step."""
        new = dice.randint(4, 10) * self.scale
        given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | settings
        with torch.no_grad():
            out = (model or self.model).generate(
                **inputs, **given, return_dict_in_generate=True, output_logits=True, pad_token_id=1
            )
        return {"tokens": out.sequences.clone(), "logits": torch.stack(out.logits)}


def shortened(model: Any) -> Any:
    """A draft of `model`: its first layer only."""
    draft = copy.deepcopy(model)
    draft.model.layers = draft.model.layers[:1]
    draft.config.num_hidden_layers = 1
    return draft.eval()


def longer(inputs: Found, said: Tensor, dice: random.Random, bed: Bed, more: int = 5) -> Found:
    """The next turn: what was said, and some tokens more."""
    new = torch.tensor([[dice.randrange(3, bed.vocabulary) for _ in range(more)] for _ in said])
    ids = torch.cat([said, new], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def joined(*parts: Found) -> Found:
    return {f"{number} {name}": t for number, part in enumerate(parts) for name, t in part.items()}


def greedy(bed: Bed, dice: random.Random) -> Found:
    return bed.say(bed.prompt(dice), dice)


def sampled(bed: Bed, dice: random.Random) -> Found:
    torch.manual_seed(dice.randrange(1 << 30))
    return bed.say(bed.prompt(dice), dice, do_sample=True, temperature=1.3)


def beams(bed: Bed, dice: random.Random) -> Found:
    return bed.say(bed.prompt(dice, dice.randint(1, 2)), dice, num_beams=3)


def returns(bed: Bed, dice: random.Random) -> Found:
    torch.manual_seed(dice.randrange(1 << 30))
    return bed.say(bed.prompt(dice), dice, do_sample=True, num_return_sequences=3)


def assisted(bed: Bed, dice: random.Random) -> Found:
    return bed.say(bed.prompt(dice), dice, assistant_model=bed.assistant)


def lookup(bed: Bed, dice: random.Random) -> Found:
    inputs = {name: t.repeat(1, 3) for name, t in bed.prompt(dice, least=6, most=12).items()}
    return bed.say(inputs, dice, prompt_lookup_num_tokens=3)


def chunked(bed: Bed, dice: random.Random) -> Found:
    return bed.say(bed.prompt(dice, least=40, most=90), dice, prefill_chunk_size=16 * bed.scale)


def batch(bed: Bed, dice: random.Random) -> Found:
    return bed.say(bed.prompt(dice, dice.randint(2, 5)), dice)


def turns(bed: Bed, dice: random.Random) -> Found:
    cache, inputs, said = bed.cache(), bed.prompt(dice, dice.randint(1, 2)), []
    for _ in range(3):
        said.append(bed.say(inputs, dice, past_key_values=cache))
        inputs = longer(inputs, said[-1]["tokens"], dice, bed)
    return joined(*said)


def cropped(bed: Bed, dice: random.Random) -> Found:
    cache, inputs = bed.cache(), bed.prompt(dice, 2)
    first = bed.say(inputs, dice, past_key_values=cache)
    cache.crop(-3)
    again = longer(inputs, first["tokens"][:, : cache.get_seq_length()], dice, bed)
    return joined(first, bed.say(again, dice, past_key_values=cache))


def reset(bed: Bed, dice: random.Random) -> Found:
    cache = bed.cache()
    first = bed.say(bed.prompt(dice, 3), dice, past_key_values=cache)
    cache.reset()
    return joined(first, bed.say(bed.prompt(dice, 2), dice, past_key_values=cache))


def saved(bed: Bed, dice: random.Random) -> Found:
    cache, inputs = bed.cache(), bed.prompt(dice, dice.randint(1, 2))
    path = bed.folder / f"saved-{id(cache)}.safetensors"
    first = bed.say(inputs, dice, past_key_values=cache)
    try:
        cache.save(path)
        back = kvcalib.load_cache(path, bed.model)
    finally:
        path.unlink(missing_ok=True)
    return joined(first, bed.say(longer(inputs, first["tokens"], dice, bed), dice, past_key_values=back))


def in_turn(bed: Bed, dice: random.Random) -> Found:
    """Caches of two artifacts by hand, pass by pass in turn, on one attached model."""
    caches = [bed.cache(), bed.artifact("high").new_cache(bed.model)]
    prompts = [bed.prompt(dice)["input_ids"] for _ in caches]
    found = []
    with torch.no_grad():
        for _ in range(3):
            for number, cache in enumerate(caches):
                logits = bed.model(prompts[number], past_key_values=cache).logits[:, -1:]
                found.append({"logits": logits})
                prompts[number] = logits.argmax(-1)
    return joined(*found)


def one_pass(bed: Bed, dice: random.Random) -> Found:
    with torch.no_grad():
        return {"logits": bed.model(**bed.prompt(dice, 2), use_cache=False).logits}


def bypassed(bed: Bed, dice: random.Random) -> Found:
    inputs = bed.prompt(dice)
    with bed.attachment.bypass():
        plain = bed.say(inputs, dice)
    return joined(plain, bed.say(inputs, dice))


def dropped(bed: Bed, dice: random.Random) -> Found:
    """A model that is loaded, attached, used and let go without `detach`."""
    mine = bed.attachment
    rotations = {layer: tap.rotation for layer, tap in mine.taps.taps.items()}
    model = copy.deepcopy(bed.spare)
    kvcalib.attach(
        model, mine.artifact, mine.sinks, mine.recent, rotations, mine.prefill, mine.adaptive, eviction=mine.eviction
    )
    return bed.say(bed.prompt(dice), dice, model)


class _Broken(LogitsProcessor):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps -= 1
        if self.steps < 0:
            raise InterruptedError("a caller's own fault, in the middle of generation")
        return scores


def interrupted(bed: Bed, dice: random.Random) -> Found:
    """A cache of another kind, which is refused, and an error of the caller's; then as if nothing had happened."""
    inputs = bed.prompt(dice)
    refused = 0
    for settings in ({"past_key_values": DynamicCache()}, {"logits_processor": LogitsProcessorList([_Broken(2)])}):
        try:
            bed.say(inputs, dice, **settings)
        except (ValueError, InterruptedError):
            refused += 1
    return bed.say(inputs, dice) | {"refused": torch.tensor(refused)}


MODES: dict[str, Callable[[Bed, random.Random], Found]] = {
    "greedy": greedy, "sampling": sampled, "beams": beams, "several returned": returns, "assisted": assisted,
    "prompt look-up": lookup, "chunked prefill": chunked, "left-padded batch": batch, "several turns": turns,
    "crop": cropped, "reset": reset, "save and load": saved, "caches of two artifacts": in_turn,
    "one pass": one_pass, "bypass": bypassed, "interrupted": interrupted,
    "a model dropped": dropped,
}  # fmt: skip

ATTACHED = ("save and load", "caches of two artifacts", "bypass", "interrupted", "a model dropped")
"""Modes that make no sense of a model with nothing attached."""


def use(bed: Bed, mode: str, seed: int) -> Found:
    """One operation."""
    return MODES[mode](bed, random.Random(f"{mode} {seed}"))
