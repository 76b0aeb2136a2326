import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from kvcalib.errors import InputError
from kvcalib.evaluation.baselines import find
from kvcalib.evaluation.baselines.baseline import Place
from kvcalib.evaluation.baselines.hf import plain_tensors
from tests.tiny import tiny_llama, tokens

pytest.importorskip("hqq", reason="the extra [bench] is not installed")
pytest.importorskip("optimum.quanto", reason="the extra [bench] is not installed")
PLACE = Place(0, 2, 16)
ROOT = Path(__file__).parents[3]
BACKENDS = ("hqq", "quanto")


def layer(backend, **changed):
    settings = {"bits": 2, "group": 16, "residual": 8} | changed
    return find(f"hf-{backend}:" + ":".join(f"{n}={v}" for n, v in settings.items())).layer(PLACE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_own_cache_hides_what_ours_shows(backend):
    """One pass through transformers' cache has the exact logits; the same layers here have not."""
    model, ids = tiny_llama(), tokens(1, 24)
    theirs = QuantizedCache(
        backend, model.config, nbits=2, q_group_size=16, residual_length=8, axis_key=0, axis_value=0
    )
    with torch.no_grad():
        exact = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(model(input_ids=ids, past_key_values=theirs).logits, exact)
        with find(f"hf-{backend}:bits=2:group=16:residual=8:key_axis=0:value_axis=0").run(model) as session:
            cache = session.new_cache()
            found = model(input_ids=ids, past_key_values=cache).logits
    assert (found - exact).abs().amax() > 0.05
    # What is stored is what transformers stores: layer 0 saw the same keys and values.
    stored, shown = theirs.layers[0], cache.layers[0]
    for name in ("_quantized_keys", "_quantized_values"):
        assert torch.equal(stored._dequantize(getattr(stored, name)), shown._dequantize(getattr(shown, name)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_update_returns_is_what_is_held(backend):
    mine = layer(backend)
    x = torch.randn(2, 2, 30, 16)
    for part in x.split([13, 1, 1, 6, 1, 8], 2):
        key, value = mine.update(part, -part)
        held = mine._dequantize(mine._quantized_keys), mine._dequantize(mine._quantized_values)
        count = held[0].shape[2]
        assert torch.equal(key[:, :, :count], held[0])
        assert torch.equal(value[:, :, :count], held[1])
        assert key.shape[2] == mine.get_seq_length()
        if count < key.shape[2]:
            assert torch.equal(key[:, :, count:], mine.keys)


def test_quanto_rounds_to_the_nearest_of_four_levels_of_each_group():
    x = torch.randn(1, 2, 3, 16)
    key, _ = layer("quanto").update(x, x)
    for group, back in zip(x.reshape(-1, 16).tolist(), key.reshape(-1, 16).tolist(), strict=True):
        low, step = min(group), (max(group) - min(group)) / 3
        levels = [low + i * step for i in range(4)]
        assert back == pytest.approx([min(levels, key=lambda level: abs(level - value)) for value in group], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_by_hand(backend, bits):
    """20 tokens of 2 heads of 16: codes, scale and zero of two bytes for each group of 16; then 3 exact tokens."""
    mine = layer(backend, bits=bits)
    x = torch.randn(1, 2, 20, 16)
    mine.update(x, x)
    expected = 2 * (20 * 32 * bits // 8 + 20 * 2 * 2 * 2)
    assert mine.nbytes == expected
    mine.update(x[:, :, :3], x[:, :, :3])
    assert mine.nbytes == expected + 2 * 3 * 32 * 2


def test_tensors_are_found_wherever_they_are():
    x, y = torch.zeros(2), torch.zeros(3)
    assert list(plain_tensors(((x, {"scale": y, "shape": (1,)}), None, 3))) == [x, y]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_are_selected_and_crops_are_refused(backend):
    mine = layer(backend)
    x = torch.randn(2, 2, 9, 16)
    key, _ = mine.update(x, x)
    mine.batch_repeat_interleave(2)
    mine.batch_select_indices(torch.tensor([3, 0]))
    again, _ = mine.update(x[:, :, :1], x[:, :, :1])
    assert torch.equal(again[:, :, :9], key.flip(0))
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        mine.crop(-1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf-hqq:bits=5", r"bits is 5, expected one of \(1, 2, 3, 4, 8\)"),
        ("hf-hqq:bits=3", r"bits is 3 with key_axis 1 and value_axis 1, expected 0 for both"),
        ("hf-quanto:bits=3", r"bits is 3, expected one of \(2, 4\)"),
        ("hf-quanto:key_axis=1", r"key_axis is 1, expected one of \(0, -1\)"),
        ("hf-quanto:group=64", r"group is 64, and a token of this model has 2 x 16 channels"),
    ],
)
def test_settings_that_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        find(spec).layer(PLACE)


def test_a_machine_that_cannot_compile_quanto_is_told_so():
    """Neither a compiler nor a cached build: another process, whose quanto finds none."""
    code = (
        "import torch, optimum.quanto.library.extensions.cpp as cpp\n"
        "from kvcalib.evaluation.baselines import find\n"
        "from kvcalib.evaluation.baselines.baseline import Place\n"
        "def load(*args, **kwargs): raise RuntimeError('no g++ here')\n"
        "import torch.utils.cpp_extension as made; made.load = load\n"
        "import optimum.quanto.library.extensions.extension as e; e.load = load\n"
        "find('hf-quanto').layer(Place(0, 2, 64))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "compiles its CPU code on first use, which failed: no g++ here; install a C++ compiler" in done.stderr


@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum-quanto")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, backend, package):
    module = f"kvcalib.evaluation.baselines.hf_{backend}"
    name = "is_hqq_available" if backend == "hqq" else "is_optimum_quanto_available"
    monkeypatch.setattr(f"{module}.{name}", lambda: False)
    with pytest.raises(InputError, match=rf"needs the package {package}.*kvcalib\[bench\]"):
        layer(backend)
