"""A float simulation of adaptive widths and eviction together: both simulations, on one cache of stock layers."""

import contextlib

import torch

import kvcalib
from kvcalib.model.taps import Taps
from tests.runtime import adaptive_talk
from tests.runtime.adaptive_talk import FAR, KEY, NEAR, POSITION, REAL, VALUE
from tests.runtime.evicting_talk import ALIVE, DRAWN, KEY_ERROR, KEY_SIZE, VALUE_ERROR, VALUE_SIZE, Choosing


class Simulation(Choosing, adaptive_talk.Simulation):
    """Of every token also marks of eviction and, for keys and values, the error of every tier; share of tokens only."""

    def __init__(self, config, artifact, adaptive, eviction, sinks, recent):
        self.tiers = len(adaptive.tiers)
        # Of an exact token the error is 0: one more tier.
        self.EXTRA = 7 + 2 * (self.tiers + 1)
        super().__init__(config, adaptive, sinks, recent)
        weighted = eviction.rule.name == "qhitter"
        self.shares = {x.index: x.friendliness.share if weighted else 1.0 for x in artifact.manifest.layers}
        self.eviction, self.alpha, self.by_head = eviction, eviction.alpha, False

    def extra(self, key_states, value_states, sides):
        batch, heads, count, _ = key_states.shape
        made = torch.zeros(batch, heads, count, self.EXTRA)
        made[..., ALIVE] = -1
        for i, (role, size, x) in enumerate((("key", KEY_SIZE, key_states), ("value", VALUE_SIZE, value_states))):
            made[..., size] = (x.float() ** 2).sum((1, 3)).sqrt()[:, None]
            for tier, done in enumerate(sides[role]):
                error = ((done - x).float() ** 2).sum((1, 3)).sqrt()
                made[..., 7 + i * (self.tiers + 1) + tier] = error[:, None]
        return made

    def life(self, layer):
        """The marks of eviction, errors being those of the tiers that tokens have now."""
        end = -(NEAR + self.near)
        marks = self.shown[layer][1][..., end - self.EXTRA : end]
        for i, (mark, error) in enumerate(((KEY, KEY_ERROR), (VALUE, VALUE_ERROR))):
            tier = self.marks(layer)[..., mark]
            tier = torch.where(tier < 0, self.tiers, tier).long()
            errors = marks[..., 7 + i * (self.tiers + 1) :][..., : self.tiers + 1]
            index = tier[:, None, :, None].expand(*marks.shape[:3], 1)
            marks[..., error] = errors.gather(-1, index)[..., 0]
        return marks

    def real(self, layer):
        return self.marks(layer)[..., REAL] > 0

    def place(self, layer):
        return self.marks(layer)[..., POSITION]

    def came(self, layer, count):
        length = self.shown[layer][0].shape[2]
        self.exact = length - count - self.packed(layer)
        before = (self.life(layer)[..., ALIVE] > 0).clone()
        for row in range(len(before)):
            self.come(layer, row, length - count, count, True)
        alive = self.life(layer)[..., ALIVE] > 0
        self.marks(layer)[..., FAR] *= (alive | ~before)[:, 0]
        self.life(layer)[:, :, length - count :, ALIVE] = self.real(layer)[:, None, length - count :].float()
        super().came(layer, count)


class Reading(adaptive_talk.Reading):
    """Attention over the tokens that are still held, which also notes what they drew."""

    def hidden(self, call, hidden):
        alive = call.tap.cache.life(call.tap.layer)[:, :1, :, ALIVE] > 0
        return hidden | ~alive[:, :, None]

    def drew(self, cache, layer, weights, group):
        marks, decay = cache.life(layer), cache.eviction.rule.decay
        queries = weights.shape[2]
        factor = decay ** torch.arange(queries - 1, -1, -1.0)
        paid = (weights * factor[:, None]).sum(2).unflatten(1, (-1, group)).sum(2)
        marks[..., DRAWN] = marks[..., DRAWN] * decay**queries + paid


@contextlib.contextmanager
def simulated(model, artifact, rotations, adaptive, eviction, sinks=0, recent=0):
    def make_cache():
        return Simulation(model.config, artifact, adaptive, eviction, sinks, recent)

    def prepare(config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = make_cache()
            if config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    with Taps(model, Reading(), rotations):
        model._prepare_cache_for_generation = prepare
        try:
            yield make_cache
        finally:
            del model._prepare_cache_for_generation


@contextlib.contextmanager
def attached(model, artifact, rotations, adaptive, eviction, sinks=0, recent=0):
    kvcalib.attach(model, artifact, sinks, recent, rotations, adaptive=adaptive, eviction=eviction)
    try:
        yield lambda: artifact.new_cache(model, sinks, recent, adaptive, eviction)
    finally:
        kvcalib.detach(model)
