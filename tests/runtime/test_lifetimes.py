"""What a serving process keeps: nothing of models, artifacts, caches and passes that are over."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import kvcalib
from kvcalib.model import angles
from kvcalib.model.taps import _TAPPED
from kvcalib.runtime import encode, heads, native, paths
from kvcalib.runtime.cache import PackedCache
from kvcalib.runtime.kernels import tables
from kvcalib.runtime.loader import load
from tests.runtime.talk import CASES, Talk, make
from tests.tiny import tiny_family, tokens

TABLES = (native._PLANS, native._TURNS, encode._TABLES, heads._READERS, heads._BITS, paths._REASONS, angles._KNOWN)


def model_of(name="llama"):
    return tiny_family(CASES[name][0], **CASES[name][1])


def gone(*references):
    gc.collect()
    return [reference() is None for reference in references]


def test_an_attached_model_can_be_dropped(case):
    artifact = case("llama")[1]
    model = model_of()
    attachment = kvcalib.attach(model, artifact)
    Talk(model).run(Talk(model).prompt(2))
    held = [weakref.ref(x) for x in (model, attachment, attachment.taps, model.lm_head.weight)]
    tapped = len(_TAPPED)
    del model, attachment
    assert all(gone(*held))
    assert len(_TAPPED) == tapped - 2


def broken(*_, **__):
    raise InterruptedError


@pytest.mark.parametrize("end", ["well", "refused", "broken"])
def test_a_cache_goes_with_its_pass(case, end, monkeypatch):
    model, artifact, rotations = case("llama")
    attachment = kvcalib.attach(model, artifact, rotations=rotations)
    try:
        cache = attachment.make_cache()
        with torch.no_grad():
            model(tokens(1, 20), past_key_values=cache)
            if end == "refused":
                cache = DynamicCache(config=model.config)
                with pytest.raises(ValueError, match="DynamicCache as past_key_values"):
                    model(tokens(1, 1), past_key_values=cache)
            elif end == "broken":
                # In the second layer, when the first has been through.
                monkeypatch.setattr(cache.layers[1], "update", broken)
                with pytest.raises(InterruptedError):
                    model(tokens(1, 1), past_key_values=cache)
        held = weakref.ref(cache)
        monkeypatch.undo()
        del cache
        assert gone(held) == [True]
        recorded = attachment.taps.recorder._pass
        assert not recorded.calls
        assert not recorded.angles
    finally:
        kvcalib.detach(model)


def test_passes_of_the_base_model_leave_nothing(case):
    model, artifact, rotations = case("llama")
    attachment = kvcalib.attach(model, artifact, rotations=rotations)
    try:
        cache = attachment.make_cache()
        with torch.no_grad():
            for number in range(5):
                model.model(tokens(1, 3, number), past_key_values=cache)
                assert len(attachment.taps.recorder._pass.calls) == 0
        with torch.enable_grad():
            for number in range(3):
                model.model(tokens(1, 3, number), past_key_values=cache)
                # Checkpointed layers may ask again: the last pass is kept.
                assert len(attachment.taps.recorder._pass.calls) == 1
    finally:
        kvcalib.detach(model)


def test_artifacts_swapped_on_one_model_leave_nothing(case, tmp_path):
    model, artifact, _ = case("llama")
    _, other, _ = make(tmp_path, *CASES["llama"], bits=2)

    def swap(path, **settings):
        kvcalib.attach(model, load(path), **settings)
        Talk(model).run(Talk(model).prompt(2))
        kvcalib.detach(model)

    def held():
        gc.collect()
        live = gc.get_objects()
        kinds = [sum(isinstance(x, kind) for x in live) for kind in (torch.Tensor, PackedCache, angles.Angles)]
        return [*map(len, TABLES), *kinds]

    for path in (artifact.path, other.path):
        swap(path)
        swap(path, keep=12)
    before = held()
    for path in (artifact.path, other.path) * 3:
        swap(path)
        swap(path, keep=12)
    assert held() == before


def test_one_artifact_attached_again_and_to_two_models_makes_its_tables_once(case):
    model, artifact, _ = case("llama")
    second = model_of()
    key = artifact.quantizers[0]["key"]
    made = []
    try:
        for which in (model, second, model):
            kvcalib.attach(which, artifact)
            Talk(which).run(Talk(which).prompt(1))
            made.append((native._PLANS[key], native._TURNS[native._PLANS[key].angles]))
            if which is second:
                kvcalib.detach(model)
    finally:
        kvcalib.detach(model)
        kvcalib.detach(second)
    assert all(mine[0] is made[0][0] and mine[1] is made[0][1] for mine in made)


def test_saved_caches_leave_no_types(case, tmp_path):
    """safetensors' own writer makes a ctypes type for every size that it meets, and keeps it."""
    model, artifact, rotations = case("llama")
    attachment = kvcalib.attach(model, artifact, rotations=rotations)

    def save(length):
        cache = attachment.make_cache()
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache)
        cache.save(tmp_path / "cache")
        kvcalib.load_cache(tmp_path / "cache", model)

    def types():
        gc.collect()
        return sum(isinstance(x, type) for x in gc.get_objects())

    try:
        save(7)
        before = types()
        for length in (8, 11, 19, 23):
            save(length)
        assert types() == before
    finally:
        kvcalib.detach(model)


def test_tables_of_kernels_leave_no_finalizer(case):
    artifact = case("llama")[1]
    stays = angles.Angles._make(list(range(8)), list(range(8, 16)), [0.5] * 8, [1.0] * 8)
    device = torch.device("cpu")

    def use():
        quantizer = copy.copy(artifact.quantizers[0]["key"])
        tables.slot_tables(quantizer, stays, device)

    use()
    gc.collect()
    before = (len(weakref.finalize._registry), len(tables._CACHE))
    for _ in range(4):
        use()
    gc.collect()
    assert (len(weakref.finalize._registry), len(tables._CACHE)) == before


def test_an_attached_model_is_not_copied(case):
    model, artifact, rotations = case("llama")
    kvcalib.attach(model, artifact, rotations=rotations)
    try:
        with pytest.raises(RuntimeError, match=r"cannot be copied; call kvcalib.detach\(model\) first"):
            copy.deepcopy(model)
    finally:
        kvcalib.detach(model)
    copy.deepcopy(model)
