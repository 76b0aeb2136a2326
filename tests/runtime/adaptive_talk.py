"""A float simulation of adaptive widths on stock layers, and tiny models with tiers; written from the documentation.

It shares nothing with `runtime/adaptive.py` and `pools.py`: transformers' own layers hold, of every token, its key and
value in every tier and exactly, and a few marks; full attention matrices say what it drew; Python picks the tier.
"""

import contextlib

import torch
from transformers import DynamicCache

import kvcalib
from kvcalib.model.taps import Taps
from kvcalib.runtime.loader import prove
from kvcalib.stages import build, tiers
from tests.runtime.simulated import simulate
from tests.runtime.talk import CASES
from tests.tiny import make_run, tiny_family

POSITION, REAL, KEY, VALUE, FAR, TRUST, NEAR = range(7)


def make(folder, name, signal="late", bits=(1, 2, 4), budget=None, **fit):
    """A tiny model, an artifact of the middle width, rotations, and adaptive widths of `bits`."""
    family, changes, _ = CASES[name]
    model = tiny_family(family, **changes)
    run = make_run(folder / "run", model, **fit)
    for b in bits:
        build.run(run, folder / f"bits{b}", b, b)
    artifact = kvcalib.load(folder / f"bits{bits[1]}")
    paths = [folder / f"bits{b}" for b in bits]
    budget = budget or sum(tiers.row_bits(q) for p in artifact.quantizers.values() for q in p.values()) / sum(
        q.layout.widths.numel() for p in artifact.quantizers.values() for q in p.values()
    )
    tiers.run(run, paths, folder / "adaptive", tiers.TierSettings(budget=budget + 0.8, signal=signal))
    return model, artifact, prove(model, list(artifact.quantizers)), kvcalib.load_adaptive(folder / "adaptive")


@contextlib.contextmanager
def attached(model, artifact, rotations, adaptive, sinks=0, recent=0):
    kvcalib.attach(model, artifact, sinks, recent, rotations, adaptive=adaptive)
    try:
        yield lambda: artifact.new_cache(model, sinks, recent, adaptive)
    finally:
        kvcalib.detach(model)


class Simulation(DynamicCache):
    """Stock layers; keys hold every tier and the exact key side by side, values the same and the marks.

    `EXTRA` more marks, from `extra`, are for those who simulate more.
    """

    EXTRA = 0

    def __init__(self, config, adaptive, sinks, recent):
        super().__init__(config=config)
        self.adaptive, self.sinks = adaptive, sinks
        self.near = adaptive.rule.window
        self.recent = max(recent, self.near)
        self.rules = {t.index: t for t in adaptive.rule.layers}
        self.forget()

    def forget(self):
        self.shown, self.since, self.counted = {}, dict.fromkeys(self.rules, 0), dict.fromkeys(self.rules, 0)

    def reset(self):
        super().reset()
        self.forget()

    def note(self, layer, positions, mask):
        real = torch.ones(positions.shape)
        if mask is not None:
            last = mask[:, 0, -1, -positions.shape[1] :]
            real = (last if last.dtype == torch.bool else last == 0).float()
        self.coming = positions, real

    def update(self, key_states, value_states, layer, *args, **kwargs):
        if layer not in self.rules:
            return super().update(key_states, value_states, layer, *args, **kwargs)
        batch, heads, count, dim = key_states.shape
        sides = {"key": [], "value": []}
        for tier in self.adaptive.tiers:
            for role, x in (("key", key_states), ("value", value_states)):
                rows = x.transpose(1, 2).reshape(batch * count, heads, dim)
                done = simulate(rows, tier[layer][role]).view(batch, count, heads, dim)
                sides[role].append(done.transpose(1, 2))
        marks = torch.zeros(batch, count, NEAR + self.near)
        marks[..., POSITION], marks[..., REAL] = (t.float().expand(batch, -1) for t in self.coming)
        marks[..., KEY] = marks[..., VALUE] = -1
        marks = marks[:, None].expand(-1, heads, -1, -1)
        extra = [self.extra(key_states, value_states, sides)] if self.EXTRA else []
        keys, values = super().update(
            torch.cat([*sides["key"], key_states], -1),
            torch.cat([*sides["value"], value_states, *extra, marks], -1),
            layer,
        )
        self.shown[layer] = keys, values, dim
        self.counted[layer] = min(self.counted[layer], self.packed(layer))
        self.came(layer, count)
        return key_states, value_states

    def came(self, layer, count):
        length = self.shown[layer][0].shape[2]
        self.pack(layer, min(length - self.recent, length - count - self.near + 1))

    def marks(self, layer):
        """`[B, T, marks]`, a view into the layer, of the first head; the other heads' are never read."""
        values = self.shown[layer][1]
        return values[:, 0, :, -(NEAR + self.near) :]

    def packed(self, layer):
        return int((self.marks(layer)[0, :, KEY] >= 0).sum())

    def tier(self, layer, role, signal):
        return sum((signal >= torch.tensor(limit)).float() for limit in getattr(self.rules[layer], role))

    def pack(self, layer, until):
        marks = self.marks(layer)
        near = marks[..., NEAR:]
        signal = near.amax(-1) if self.adaptive.rule.signal == "peak" else near[..., self.near // 2 :].mean(-1)
        sink = (marks[..., REAL] > 0) & (marks[..., REAL].cumsum(1) <= self.sinks)
        for token in range(self.packed(layer), until):
            for role, mark in (("key", KEY), ("value", VALUE)):
                tier = self.tier(layer, role, signal[:, token])
                marks[:, token, mark] = torch.where(sink[:, token], float(len(self.adaptive.tiers)), tier)
            marks[:, token, TRUST] = signal[:, token] / self.rules[layer].mean

    def read(self, layer):
        """Keys, values `[B, H, T, D]` as attention sees them and positions."""
        keys, values, dim = self.shown[layer]
        marks, exact = self.marks(layer), len(self.adaptive.tiers)
        out = []
        for x, mark in ((keys, KEY), (values, VALUE)):
            tier = torch.where(marks[..., mark] < 0, exact, marks[..., mark]).long()
            sides = x[..., : (exact + 1) * dim].unflatten(-1, (exact + 1, dim))
            index = tier[:, None, :, None, None].expand(*sides.shape[:3], 1, dim)
            out.append(sides.gather(3, index)[..., 0, :])
        return *out, marks[..., POSITION].long()

    def drew(self, layer, weights):
        """Take `weights [B, Hq, Q, T]` in, and pack what left the window."""
        one = weights.amax(1) if self.adaptive.rule.signal == "peak" else weights.mean(1)
        queries, length = one.shape[1:]
        marks = self.marks(layer)
        for i in range(queries):
            query = length - queries + i
            for back in range(min(self.near, query + 1)):
                marks[:, query - back, NEAR + back] = one[:, i, query - back]
        self.pack(layer, length - self.recent)
        if self.adaptive.keep_exact == "cpu":
            self.follow(layer, one[:, -self.near :], queries, marks)

    def follow(self, layer, late, queries, marks):
        known = marks[:, : self.counted[layer]]
        if self.adaptive.rule.signal == "peak":
            known[..., FAR] = torch.maximum(known[..., FAR], late.amax(1)[:, : known.shape[1]])
        else:
            known[..., FAR] += late.sum(1)[:, : known.shape[1]]
        self.since[layer] += queries
        if self.since[layer] >= self.adaptive.every:
            self.again(layer)

    def again(self, layer):
        known = self.marks(layer)[:, : self.counted[layer]]
        self.since[layer] = 0
        for row in known:
            seen = row[:, FAR][row[:, FAR] > 0]
            mean = float(seen.mean()) if len(seen) else 1.0
            for mark in row:
                mark[TRUST] = (mark[TRUST] + mark[FAR] / mean) / 2
                mark[FAR] = 0
                for role, place in (("key", KEY), ("value", VALUE)):
                    if mark[place] < len(self.adaptive.tiers):
                        mark[place] = self.tier(layer, role, mark[TRUST] * self.rules[layer].mean)
        self.counted[layer] = self.packed(layer)


class Reading:
    """Handler that reads a `Simulation` with attention written out."""

    def before(self, tap):
        tap.cache.note(tap.layer, tap.rotary.position_ids, tap.mask)

    def drew(self, cache, layer, weights, group):
        """Take in `weights [B, Hq, Q, T]`, before the cache does."""

    def hidden(self, call, hidden):
        """Which tokens `[B, 1, Q, T]` are hidden, `hidden` being those that the mask hides."""
        return hidden

    def attend(self, call):
        key, value, positions = call.tap.cache.read(call.tap.layer)
        query = call.rotate_new(call.query).float()
        key = call.rotate_at(key.to(call.query.dtype), positions).float()
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * call.scaling
        if call.kwargs.get("softcap") is not None:
            scores = call.kwargs["softcap"] * torch.tanh(scores / call.kwargs["softcap"])
        new, length = scores.shape[2:]
        hidden = torch.arange(length)[None] > torch.arange(length - new, length)[:, None]
        if call.mask is not None:
            hidden = ~call.mask if call.mask.dtype == torch.bool else call.mask < -1e30
        scores = scores.masked_fill(self.hidden(call, hidden), -torch.inf)
        extra = call.kwargs.get("s_aux")
        if extra is not None:
            extra = extra.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.nan_to_num(0.0)
        self.drew(call.tap.cache, call.tap.layer, weights, group)
        call.tap.cache.drew(call.tap.layer, weights)
        out = weights @ value.float().repeat_interleave(group, 1)
        return out.transpose(1, 2).to(call.query.dtype), None


@contextlib.contextmanager
def simulated(model, artifact, rotations, adaptive, sinks=0, recent=0):
    def make_cache():
        return Simulation(model.config, adaptive, sinks, recent)

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
