"""A float simulation of eviction on stock layers, token by token, written from the documentation of `policies`.

Nothing is ever moved or dropped in it: of every token and head a mark says whether it is still held, another what
attention it drew. Queries go one at a time. It shares nothing with `runtime/evicting.py`.
"""

import contextlib
import math

import torch

import kvcalib
from kvcalib.model.taps import Taps
from tests.runtime.simulated import SimulatedCache, simulate

ALIVE, DRAWN, KEY_ERROR, VALUE_ERROR, KEY_SIZE, VALUE_SIZE, PROMPT = range(7)


class Choosing:
    """Who stays, from marks of eviction `[B, H, T, 7]` that `life(layer)` gives.

    Whoever takes this in has `eviction`, `alpha`, `by_head`, `sinks`, `shares` by layer, `real(layer)` and
    `place(layer)`, both `[B, T]`, and `exact`, tokens of the exact window.
    """

    def budget(self, layer, seen):
        e, sinks, share = self.eviction, self.eviction.rule.sinks, self.shares[layer]
        least = sinks + (int(e.recent) + 2 if e.keep > 1 else 4)
        return max(least, math.floor(e.keep * share * (1 if e.keep > 1 else min(seen, seen / (e.keep * share))) + 1e-9))

    def block(self, layer):
        return max(1, int(self.eviction.keep * self.shares[layer] * self.eviction.rule.every))

    def come(self, layer, row, token, pass_tokens, first):
        """Before `token` of `row` is taken in: let others go. `first`: it is the first of a pass of `pass_tokens`."""
        e, rule = self.eviction, self.eviction.rule
        if not rule.evicts:
            return
        held = int((self.life(layer)[row, 0, :, ALIVE] > 0).sum())
        came = int((self.life(layer)[row, 0, :, ALIVE] >= 0)[self.real(layer)[row]].sum())
        if e.keep > 1:
            block, most = self.block(layer), self.budget(layer, 0)
            if self.real(layer)[row, token] and came % block == 0 and held + block > most:
                self.let_go(layer, row, most - block, came)
        elif first and pass_tokens <= 16:
            seen = came + pass_tokens
            if not rule.grows:
                first = self.life(layer)[row, :, 0, PROMPT]
                came = seen = int(first[0]) or came
                first[:] = came
            most = self.budget(layer, seen)
            if held + pass_tokens > most:
                self.let_go(layer, row, most - max(pass_tokens, int(most * rule.every)), came)

    def let_go(self, layer, row, target, seen):
        e, rule = self.eviction, self.eviction.rule
        recents = max(1, int(e.recent) if e.keep > 1 else math.floor(e.recent * seen + 1e-9), 0)
        recents = min(recents, max(0, target - max(rule.sinks, self.sinks)))
        marks = self.life(layer)[row].double()
        positions = self.place(layer)[row]
        heads = marks.shape[0]
        lists = [[t for t in range(marks.shape[1]) if marks[h, t, ALIVE] > 0] for h in range(heads)]
        window = self.exact
        for h in range(heads):
            mine = lists[h]
            always = set(mine[: max(rule.sinks, self.sinks)]) | set(mine[len(mine) - max(recents, window) :])
            free = [t for t in mine if t not in always]
            count = max(0, target - len(always))
            kept = always | set(self.choose(marks, positions, lists, h, free, count, seen))
            for t in mine:
                self.life(layer)[row, h, t, ALIVE] = float(t in kept)

    def choose(self, marks, positions, lists, h, free, count, seen):
        name, rule = self.eviction.rule.name, self.eviction.rule
        newest = max(positions[t] for mine in lists for t in mine)

        def drew(h, t):
            return float(marks[h, t, DRAWN] if self.by_head else marks[:, t, DRAWN].sum())

        def top(score, among, n):
            # Of equal ones the later.
            return sorted(among, key=lambda t: (score(t), t), reverse=True)[:n]

        if name == "window":
            return top(lambda t: t, free, count)
        if name == "h2o":
            return top(lambda t: drew(h, t), free, count)
        if name == "qhitter":

            def mean(t):
                if not rule.age_norm:
                    return drew(h, t)
                age = int(newest - positions[t]) + 1
                return drew(h, t) / sum(rule.decay**i for i in range(age))

            most = max(mean(t) for t in lists[h])

            def score(t):
                error = (marks[h, t, KEY_ERROR] / marks[h, t, KEY_SIZE]
                         + marks[h, t, VALUE_ERROR] / marks[h, t, VALUE_SIZE]) / 2  # fmt: skip
                friendly = round(255 * max(0.0, 1 - float(error))) / 255
                return self.alpha * mean(t) / most + (1 - self.alpha) * friendly

            return top(score, free, count)
        everything = [(g, t) for g in range(len(lists)) for t in lists[g]]

        def unit(f):
            low, high = min(f(*x) for x in everything), max(f(*x) for x in everything)
            return lambda t: (f(h, t) - low) / (high - low) if high > low else 0.0

        attention = unit(drew)
        key = unit(lambda g, t: float(marks[g, t, KEY_ERROR]))
        value = unit(lambda g, t: float(marks[g, t, VALUE_ERROR]))
        share = (self.eviction.keep - self.eviction.recent) * (1 if self.eviction.keep > 1 else seen)
        first = min(count, math.floor(share * 7 / 15 + 1e-9))
        second = min(count - first, max(1, math.floor(share * 8 / 15 + 1e-9)))
        default = top(lambda t: drew(h, t), free, first)
        rest = [t for t in free if t not in default]
        return default + top(lambda t: rule.alpha * attention(t) + (1 - rule.alpha) * (2 - key(t) - value(t)) / 2,
                             rest, second)  # fmt: skip


class Simulation(Choosing, SimulatedCache):
    """Marks of eviction `[B, H, T, 7]` beside those of `SimulatedCache` in the values of stock layers."""

    EXTRA = 7

    def __init__(self, config, artifact, eviction, alpha, by_head, sinks=0, recent=0):
        super().__init__(config, artifact.quantizers, sinks, recent)
        weighted = eviction.rule.name == "qhitter"
        self.shares = {x.index: x.friendliness.share if weighted else 1.0 for x in artifact.manifest.layers}
        assert eviction.keep > 1 or eviction.keep * max(self.shares.values()) <= 1
        self.eviction, self.alpha, self.by_head = eviction, alpha, by_head

    def extra(self, layer, key_states, value_states):
        batch, heads, count, _ = key_states.shape
        self.new = count
        marks = torch.zeros(batch, heads, count, self.EXTRA)
        marks[..., ALIVE] = -1  # not come yet
        for error, size, x, role in (
            (KEY_ERROR, KEY_SIZE, key_states, "key"), (VALUE_ERROR, VALUE_SIZE, value_states, "value")
        ):  # fmt: skip
            rows = x.transpose(1, 2).reshape(batch * count, heads, -1)
            done = simulate(rows, self.quantizers[layer][role])
            for place, squares in ((error, (done - rows) ** 2), (size, rows**2)):
                total = squares.sum(-1)
                if not self.by_head:
                    total = total.sum(-1, keepdim=True).expand(-1, heads)
                marks[..., place] = total.sqrt().view(batch, count, heads).transpose(1, 2)
        return marks

    def leave(self, layer):
        if self.eviction.keep <= 1:
            # What the window holds when tokens are let go: before the new ones come.
            self.exact = int((self.shown[layer][1][0, 0, : -self.new, -1] == 0).sum())
            super().leave(layer)

    def leave_before(self, layer, token, new):
        """With a number to keep, tokens come in blocks: mark what has left the window once `token`'s block is in."""
        if self.eviction.keep > 1:
            values = self.shown[layer][1]
            length = values.shape[2]
            block = self.block(layer)
            real = self.real(layer)
            starts = [t for t in range(token + 1, length) for row in real if row[t] and row[:t].sum() % block == 0]
            end = min([*starts, length])
            self.exact = int((values[0, 0, :token, -1] == 0).sum())
            values[:, :, : max(0, end - self.recent), -1] = 1

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        sinks = max(self.eviction.rule.sinks, self.sinks)
        for layer in self.quantizers:
            keys, values = self.layers[layer].keys, self.layers[layer].values
            self.shown[layer] = keys, values
            for row in self.life(layer)[..., ALIVE]:
                held = [[t for t in range(len(head)) if head[t] > 0] for head in row]
                least = min(map(len, held))
                for head, mine in zip(row, held, strict=True):
                    for t in mine[min(sinks, least) : len(mine) - max(0, least - sinks)]:
                        head[t] = 0

    def life(self, layer):
        return self.shown[layer][1][..., -3 - self.EXTRA : -3]

    def place(self, layer):
        return self.shown[layer][1][:, 0, :, -3]

    def real(self, layer):
        return self.shown[layer][1][:, 0, :, -2] > 0


class Reading:
    """Attention of one query at a time over the tokens that are still held."""

    def before(self, tap):
        tap.cache.note(tap.layer, tap.rotary.position_ids, tap.mask)

    def attend(self, call):
        cache, layer = call.tap.cache, call.tap.layer
        if layer not in cache.quantizers:
            return call.plain(call.rotate_new(call.query), call.rotate_new(call.key), call.value)
        key, value, positions = cache.read(layer)
        marks, real = cache.life(layer), cache.real(layer)
        batch, heads, length, _ = key.shape
        new, group = call.query.shape[2], call.query.shape[1] // heads
        query = call.rotate_new(call.query).float()
        out = torch.zeros(batch, new, call.query.shape[1], value.shape[-1])
        for i in range(new):
            token = length - new + i
            cache.leave_before(layer, token, new)
            key, value, _ = cache.read(layer)
            turned = call.rotate_at(key.to(call.query.dtype), positions).float()
            for b in range(batch):
                cache.come(layer, b, token, new, i == 0)
                marks[b, :, token, ALIVE] = float(real[b, token])
                if not real[b, token]:
                    continue
                alive = marks[b, :, :, ALIVE] > 0
                marks[b, :, : token + 1, DRAWN] *= cache.eviction.rule.decay
                for h in range(heads):
                    held = alive[h].nonzero()[:, 0]
                    k, q = turned[b, h, held], query[b, h * group : (h + 1) * group, i]
                    if cache.eviction.streaming:
                        rank = torch.arange(len(held))[None]
                        raw = key[b, h, held].to(call.query.dtype)[None, None]
                        k = call.rotate_at(raw, rank)[0, 0].float()
                        mine = call.query[b, h * group : (h + 1) * group, i][None, :, None]
                        q = call.rotate_at(mine, rank[:, -1:])[0, :, 0].float()
                    scores = q @ k.T * call.scaling
                    if call.kwargs.get("softcap") is not None:
                        scores = call.kwargs["softcap"] * torch.tanh(scores / call.kwargs["softcap"])
                    extra = call.kwargs.get("s_aux")
                    if extra is not None:
                        scores = torch.cat([scores, extra.float()[h * group : (h + 1) * group, None]], -1)
                    weights = scores.softmax(-1)[:, : len(held)]
                    out[b, i, h * group : (h + 1) * group] = weights @ value[b, h, held].float()
                    marks[b, h, held, DRAWN] += weights.sum(0)
        return out.to(call.query.dtype), None


@contextlib.contextmanager
def simulated(model, artifact, rotations, eviction, alpha=1.0, by_head=True, sinks=0, recent=0):
    def make_cache():
        return Simulation(model.config, artifact, eviction, alpha, by_head, sinks, recent)

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
def attached(model, artifact, rotations, eviction, sinks=0, recent=0):
    kvcalib.attach(model, artifact, sinks, recent, rotations, eviction=eviction)
    try:
        yield lambda: artifact.new_cache(model, sinks, recent, eviction=eviction)
    finally:
        kvcalib.detach(model)
