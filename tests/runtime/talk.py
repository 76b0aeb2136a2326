"""Tiny models with their artifacts, and the ways to use one that tests of `generate()` share."""

import contextlib
import functools
import warnings
from dataclasses import replace

import torch

import kvcalib
from kvcalib.model.selftest import attention_layers
from kvcalib.quant.basis import Basis
from kvcalib.quant.codebook import Codebook
from kvcalib.runtime.loader import prove
from kvcalib.stages import build
from tests.tiny import make_run, tiny_family, tokens

PROMPT, NEW = 21, 9
# About the largest value of a tiny model.
LARGEST = 4.0
WINDOW = 12
TWO = {"num_hidden_layers": 2}
HYBRID = TWO | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
# Tied embeddings would make a random gemma repeat its last token.
GEMMA = HYBRID | {"tie_word_embeddings": False}
# Family, what to change in its tiny model, and whether sliding layers are packed too.
CASES = {
    "llama": ("llama", TWO, False),
    "qwen3": ("qwen3", TWO, False),
    "phi3": ("phi3", TWO, False),
    "gpt_oss": ("gpt_oss", HYBRID, False),
    "cohere2": ("cohere2", HYBRID, False),
    "gemma3_text": ("gemma3_text", GEMMA, False),
    "gemma3_text inside the window": ("gemma3_text", GEMMA, True),
    "cohere2 inside the window": ("cohere2", HYBRID, True),
    "mistral all sliding": ("mistral", TWO | {"sliding_window": WINDOW}, True),
}


def make(folder, family, changes, inside, bits=3, **fit):
    """A tiny model, its artifact and the rotations of its layers."""
    model = tiny_family(family, **changes)
    run = make_run(folder / "run", model, layers=sorted(attention_layers(model)) if inside else None, **fit)
    build.run(run, folder / "artifact", bits, bits)
    artifact = kvcalib.load(folder / "artifact")
    return model, artifact, prove(model, list(artifact.quantizers))


def with_values(artifact, relative):
    """`artifact`, its values' codebooks relative to each token's range, or of values along some axes."""
    return replace(artifact, quantizers={i: pair_of(pair, relative) for i, pair in artifact.quantizers.items()})


def pair_of(pair, relative):
    """The quantizers of one layer, for `with_values`."""
    book = pair["value"].codebook
    levels = book.centroids / book.centroids.abs().max() * (1.0 if relative else LARGEST)
    basis = None if relative else axes(*book.widths.shape)
    return pair | {
        "value": replace(pair["value"], relative=relative, codebook=Codebook(book.widths, levels), basis=basis)
    }


@functools.cache
def axes(heads, dim):
    """Orthogonal axes at random, the same for all."""
    return Basis(torch.linalg.qr(torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(0))).Q)


@contextlib.contextmanager
def attached(model, artifact, rotations=None, sinks=0, recent=0, exact_prefill=False):
    """`model` generates on packed caches; gives the function that makes one."""
    kvcalib.attach(model, artifact, sinks, recent, rotations, "exact" if exact_prefill else "quantized")
    try:
        yield lambda: artifact.new_cache(model, sinks, recent)
    finally:
        kvcalib.detach(model)


class Talk:
    """One use of a model: makes prompts and caches, and generates."""

    def __init__(self, model, new_cache=None, seed=9):
        self.model, self.new_cache, self.seed = model, new_cache, seed

    def prompt(self, rows=1, length=PROMPT):
        """Left-padded: each row has 4 tokens less than the one before."""
        ids = tokens(rows, length, self.seed)
        mask = torch.ones_like(ids)
        for row in range(rows):
            ids[row, : 4 * row] = 0
            mask[row, : 4 * row] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def embedded(self, rows):
        inputs = self.prompt(rows)
        return {"inputs_embeds": self.model.get_input_embeddings()(inputs.pop("input_ids"))} | inputs

    def echo(self):
        """A prompt that repeats itself, so that looking up continuations in it finds some."""
        ids = tokens(1, 6, self.seed).repeat(1, 4)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run(self, inputs, new=NEW, **settings):
        torch.manual_seed(self.seed)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.generate(**inputs, **settings)

    def turns(self, rows=1, **settings):
        cache, inputs = self.new_cache(), self.prompt(rows)
        for turn in range(3):
            said = self.run(inputs, past_key_values=cache, **settings)
            inputs = longer(inputs, torch.cat([said, tokens(rows, 5, turn)], 1))
        return said

    def reset(self):
        cache = self.new_cache()
        self.run(self.prompt(3), past_key_values=cache)
        cache.reset()
        return self.run(self.prompt(2), past_key_values=cache)

    def contrastive(self):
        """What contrastive search does with a cache: repeat it for every candidate, keep some rows, go on."""
        cache, inputs = self.new_cache(), self.prompt(2)
        inputs = longer(inputs, self.run(inputs, past_key_values=cache))
        cache.batch_repeat_interleave(3)
        inputs = {name: t.repeat_interleave(3, 0) for name, t in inputs.items()}
        inputs = longer(inputs, self.run(inputs, past_key_values=cache, do_sample=True))
        rows = torch.tensor([4, 1, 0])
        cache.batch_select_indices(rows)
        return self.run({name: t[rows] for name, t in inputs.items()}, past_key_values=cache)

    def roll_back(self):
        """Take 1 token back and go another way, then 8 tokens."""
        cache, inputs = self.new_cache(), self.prompt(2)
        cache.activate_past_recording()
        said = self.run(inputs, past_key_values=cache)
        for back in (1, NEW - 1):
            cache.crop(-back)
            cache.activate_past_recording()
            again = longer(inputs, torch.cat([said[:, : cache.get_seq_length()], tokens(2, 3, back)], 1))
            said = self.run(again, past_key_values=cache)
        return said


def longer(inputs, ids):
    """The inputs of a later turn, whose tokens so far are `ids`."""
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}
