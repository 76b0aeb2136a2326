"""Contenders whose cache is known: the model's own, or that with a fault planted."""

import contextlib

from transformers import DynamicCache

from kvcalib.errors import UnsupportedModel
from kvcalib.evaluation.contender import Contender
from kvcalib.evaluation.trials import Session


class Faulty(DynamicCache):
    """Keys and values of one layer go through `fault` when they come."""

    def __init__(self, config, layer, fault):
        super().__init__(config=config)
        self.layer, self.fault = layer, fault

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == self.layer:
            key_states, value_states = self.fault(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Made(Session):
    def __init__(self, model, make):
        super().__init__(model, None)
        self.make = make

    def new_cache(self):
        return self.make()


class Custom(Contender):
    """A fault in one layer; none by default."""

    source = "test"

    def __init__(self, name, fault=lambda key, value: (key, value), layer=0):
        self.name, self.fault, self.layer = name, fault, layer

    @contextlib.contextmanager
    def run(self, model):
        yield Made(model, lambda: Faulty(model.config, self.layer, self.fault))


class Refusing(Contender):
    name = "refusing"

    @contextlib.contextmanager
    def run(self, model):
        raise UnsupportedModel("this model's layers are not for it")
        yield


class Rude(Contender):
    """Leaves the model changed."""

    name = "rude"

    @contextlib.contextmanager
    def run(self, model):
        model.lm_head.weight.data.mul_(1.5)
        yield Session(model, None)


def no_values(key, value):
    return key, value * 0


def one_late(key, value):
    return key.roll(1, 2), value
