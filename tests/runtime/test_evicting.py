"""Eviction in packed storage: every mode of `generate()` as a simulation that never moves a token."""

import copy
import functools

import pytest
import torch

import kvcalib
from kvcalib.runtime.evicting import EvictingLayer
from kvcalib.runtime.eviction import Eviction
from kvcalib.runtime.policies import Policy
from kvcalib.runtime.policies.qhitter import QHitter
from tests.runtime.evicting_talk import attached, simulated
from tests.runtime.talk import CASES, Talk, make
from tests.runtime.test_generate import MODES, Drafted
from tests.tiny import tokens

NAMES = ["window", "h2o", "qhitter", "qhitter-published"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`case(name, outliers)`: model, artifact and rotations, made once; with outliers heads cannot stand alone."""

    @functools.cache
    def get(name="llama", outliers=0.0, **fit):
        return make(tmp_path_factory.mktemp("evicting"), *CASES[name], outliers=outliers)

    return get


def settings(policy="h2o", keep=0.4, recent=0.1, alpha=0.6, **more):
    return Eviction(keep, recent, policy, alpha=alpha, **more)


def both(case, mode, eviction, by_head=True, seed=9, **exact):
    with simulated(*case, eviction, eviction.alpha, by_head, **exact) as new_cache:
        expected = mode(Talk(case[0], new_cache, seed))
    with attached(*case, eviction, **exact) as new_cache:
        found = mode(Talk(case[0], new_cache, seed))
    return found, expected


def check_same(case, mode, eviction, by_head=True, **exact):
    """Two tokens may score alike to the last bit but one; then another seed tells a fault from a tie."""
    found, expected = both(case, mode, eviction, by_head, **exact)
    if not torch.equal(found, expected):
        found, expected = both(case, mode, eviction, by_head, seed=10, **exact)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("policy", ["h2o", "qhitter"])
def test_mode_gives_the_tokens_of_the_simulation(case, policy, mode):
    check_same(case(), mode, settings(policy))


SOME = ["left-padded", "beam search", "prompt lookup", "turns of chunks", "contrastive", "roll back", "reset"]


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("policy", NAMES)
def test_constant_memory_streaming(case, policy, mode):
    check_same(case(), MODES[mode], settings(policy, keep=14, recent=3, streaming=True))


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("policy", NAMES)
def test_rows_whose_heads_cannot_stand_alone(case, policy, mode):
    check_same(case(outliers=0.03), MODES[mode], settings(policy), by_head=False)
    check_same(case(), MODES[mode], settings(policy, per="layer"), by_head=False)


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("exact", [{"sinks": 2}, {"recent": 3}, {"sinks": 3, "recent": 5}], ids=str)
def test_exact_sinks_and_window(case, exact, mode):
    check_same(case(), MODES[mode], settings("qhitter"), **exact)
    check_same(case(), MODES[mode], settings("h2o", keep=15, recent=2), **exact)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt_oss", "cohere2", "gemma3_text"])
@pytest.mark.parametrize("mode", ["left-padded", "turns", "chunked prefill"])
def test_families(case, name, mode):
    check_same(case(name), MODES[mode], settings("qhitter"))
    check_same(case(name), MODES[mode], settings("h2o", keep=14, recent=3, streaming=True))
