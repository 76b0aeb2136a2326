"""Saved caches: another process goes on bit by bit; what does not fit or is damaged is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcalib
from kvcalib.errors import ArtifactMismatch, CorruptFile, InputError
from kvcalib.files import METADATA_KEY, hash_tensor, read_tensors, write_tensors
from kvcalib.runtime.cache import PackedCache
from tests.runtime.talk import CASES, WINDOW, Talk, attached, longer, make, with_values
from tests.tiny import tokens

SETTINGS = {
    "plain": ("llama", {}),
    "exact tokens": ("llama", {"sinks": 3, "recent": 4}),
    "all exact": ("llama", {"sinks": 2, "recent": 40}),
    "sliding layers stock": ("gemma3_text", {"sinks": 3, "recent": 4}),
    "sliding layers packed": ("gemma3_text inside the window", {"recent": 4}),
    "all sliding": ("mistral all sliding", {}),
    "no positions": ("cohere2", {"sinks": 1}),
}
ONE_PROCESS = """
import sys, torch, kvcalib
torch.set_num_threads(1)
from tests.runtime.talk import CASES
from tests.runtime.test_saved import logits, prompted
from tests.tiny import tiny_family
for folder, name, settings in eval(sys.argv[2]):
    model = tiny_family(*CASES[name][:1], **CASES[name][1])
    attachment = kvcalib.attach(model, folder + "/artifact", **settings)
    if sys.argv[1] == "save":
        cache = prompted(model, attachment.make_cache())
        cache.save(folder + "/prompt.safetensors")
    else:
        cache = kvcalib.PackedCache.load(folder + "/prompt.safetensors", model)
    torch.save(logits(model, cache), folder + "/" + sys.argv[1])
    kvcalib.detach(model)
"""


def following(rows):
    """Two passes after a prompt: 3 tokens, then 1."""
    inputs = Talk(None).prompt(rows)
    ids = tokens(rows, 4, seed=5)
    mask = longer(inputs, torch.cat([inputs["input_ids"], ids], 1))["attention_mask"]
    positions = mask.cumsum(1) - 1
    return [(ids[:, :3], mask[:, :-1], positions[:, -4:-1]), (ids[:, 3:], mask, positions[:, -1:])]


def logits(model, cache, rows=3):
    with torch.no_grad():
        return [model(i, attention_mask=m, position_ids=p, past_key_values=cache).logits for i, m, p in following(rows)]


def prompted(model, cache, rows=3):
    """`cache` after a left-padded prompt that is longer than the window."""
    inputs = Talk(model).prompt(rows)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=positions, past_key_values=cache)
    return cache


def test_another_process_goes_on_with_the_same_bits(case, tmp_path):
    """Two fresh processes: what other tests did to this one's kernels and threads must not matter."""
    jobs = []
    for name, (family, settings) in SETTINGS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "artifact").symlink_to(case(family)[1].path)
        jobs.append((str(folder), family, {"sinks": 0, "recent": 0} | settings))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for role in ("save", "load"):
        command = [sys.executable, "-c", ONE_PROCESS, role, repr(jobs)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for name in SETTINGS:
        mine, theirs = (torch.load(tmp_path / name / role, weights_only=True) for role in ("save", "load"))
        assert len(mine) == 2
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), name


@pytest.fixture
def saved(case, tmp_path):
    """A cache with everything in it, on disk: `(model, artifact, rotations), settings, path, cache`."""
    parts, settings = case("gemma3_text"), {"sinks": 3, "recent": 4}
    with attached(*parts, **settings) as new_cache:
        cache = prompted(parts[0], new_cache())
        cache.save(tmp_path / "prompt.safetensors")
        yield parts, settings, tmp_path / "prompt.safetensors", cache


@pytest.mark.parametrize(("name", "relative"), [*((name, False) for name in SETTINGS), ("plain", True)])
def test_what_is_loaded_is_what_was_saved(case, tmp_path, name, relative):
    family, settings = SETTINGS[name]
    model, artifact, rotations = case(family)
    with attached(model, with_values(artifact, relative), rotations, **settings) as new_cache:
        cache = prompted(model, new_cache())
        Talk(model).run(longer(Talk(model).prompt(3), tokens(3, 30)), past_key_values=cache)
        cache.save(tmp_path / "a")
        assert relative == any(n.endswith("value.zero") for n in load_file(tmp_path / "a"))
        again = kvcalib.load_cache(tmp_path / "a", model)
        again.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert again.get_seq_length() == cache.get_seq_length()
        inputs = longer(Talk(model).prompt(3), tokens(3, 60))
        assert torch.equal(*(Talk(model).run(inputs, past_key_values=c) for c in (cache, again)))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_one_prompt_serves_a_batch(case, tmp_path, name):
    with attached(*case(name), sinks=2, recent=3) as new_cache:
        model = case(name)[0]
        prompted(model, new_cache(), rows=1).save(tmp_path / "one")
        cache = kvcalib.load_cache(tmp_path / "one", model)
        cache.batch_repeat_interleave(3)
        ids = torch.cat([Talk(model).prompt(1)["input_ids"].expand(3, -1), tokens(3, 4, 8)], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = Talk(model).run(inputs, past_key_values=cache)
        for row in range(3):
            alone = {n: t[row : row + 1] for n, t in inputs.items()}
            one = kvcalib.load_cache(tmp_path / "one", model)
            assert torch.equal(Talk(model).run(alone, past_key_values=one)[0], found[row])


def test_recorded_past_is_left_behind(case, tmp_path):
    """While drafts are checked sliding layers keep more than their window."""
    with attached(*case("gemma3_text")) as new_cache:
        model, cache = case("gemma3_text")[0], new_cache()
        cache.activate_past_recording()
        prompted(model, cache).save(tmp_path / "c")
        assert load_file(tmp_path / "c")["layers.0.keys"].shape[2] == WINDOW - 1
        again = kvcalib.load_cache(tmp_path / "c", model)
        assert all(torch.equal(a, b) for a, b in zip(logits(model, cache), logits(model, again), strict=True))


def test_another_artifact_is_refused(saved, tmp_path):
    (model, _, _), _, path, _ = saved
    _, other, _ = make(tmp_path, *CASES["gemma3_text"], bits=2)
    with pytest.raises(ArtifactMismatch, match=rf"{path.name}: .*artifact 'artifact' \(.{{12}}\), this is 'artifact'"):
        other.load_cache(path, model, 3, 4)


def test_another_model_is_refused(saved, case):
    (model, artifact, _), _, path, _ = saved
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[0, 0] += 1
    artifact._fits.clear()
    try:
        with pytest.warns(UserWarning, match="weights"), pytest.raises(ArtifactMismatch, match="weights_sha256 is"):
            artifact.load_cache(path, model, 3, 4)
    finally:
        with torch.no_grad():
            embeddings[0, 0] -= 1
        artifact._fits.clear()
    other, theirs, _ = case("llama")
    with pytest.raises(ArtifactMismatch, match="model_type is 'gemma3_text', expected 'llama'"):
        theirs.load_cache(path, other, 3, 4)


@pytest.mark.parametrize(("setting", "value"), [("sinks", 2), ("recent", 5)])
def test_other_settings_are_refused(saved, setting, value):
    (model, artifact, _), settings, path, _ = saved
    with pytest.raises(ArtifactMismatch, match=f"{setting} was {settings[setting]} when.*expected {value}"):
        artifact.load_cache(path, model, **(settings | {setting: value}))


def test_another_dtype_is_refused(saved, tmp_path):
    (model, artifact, _), settings, path, _ = saved
    half = rewritten(path, tmp_path / "half", lambda _, header: header["origin"].update(dtype="bfloat16"))
    with pytest.raises(ArtifactMismatch, match=r"half: dtype was 'bfloat16' when.*expected 'float32'"):
        artifact.load_cache(half, model, **settings)


def test_no_byte_can_be_changed(saved, tmp_path):
    (model, artifact, _), settings, path, _ = saved
    content = path.read_bytes()
    damaged = tmp_path / "damaged"
    for place in [*range(0, len(content), 487), *range(40), len(content) - 1]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        damaged.write_bytes(flipped)
        with pytest.raises((CorruptFile, ArtifactMismatch), match=r"damaged: "):
            artifact.load_cache(damaged, model, **settings)
    for size in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:size])
        with pytest.raises(CorruptFile, match=rf"damaged: .*{size} bytes"):
            artifact.load_cache(damaged, model, **settings)


def rewritten(path, out, change):
    """`path` with its tensors or header changed, and hashes that are right again."""
    held, header = read_tensors(path)
    change(held, header)
    header["sha256"] = {name: hash_tensor(t) for name, t in held.items()}
    write_tensors(out, held, header)
    return out


def put(name, make):
    def change(held, _):
        held[name] = make(held[name])

    return change


def drop(*names):
    def change(held, _):
        for name in names:
            held.pop(name)

    return change


def state(layer, **values):
    return lambda _, header: header["layers"][layer].update(values)


LAYER = "layers.1.packed"
HOSTILE = {
    "fewer tokens": (put(f"{LAYER}.key.words", lambda t: t[:, 1:]), r"layers\[1\].*key"),
    "fewer rows": (put(f"{LAYER}.key.words", lambda t: t[:2]), r"layers\[1\].*words"),
    "other words": (put(f"{LAYER}.value.words", lambda t: t[..., 1:]), r"layers\[1\].*value\.words"),
    "other type": (put(f"{LAYER}.key.words", lambda t: t.long()), r"layers\[1\].*key\.words is torch\.int64"),
    "a number": (put(f"{LAYER}.key.words", lambda t: torch.tensor(3)), r"layers\[1\].*key\.words"),
    "a wild outlier": (put(f"{LAYER}.key.outlier_index", lambda t: t + 200), r"layers\[1\].*outlier_index is outside"),
    "a wild sink": (put("layers.1.sink.slot", lambda t: t + 99), r"layers\[1\].*sink\.slot is outside"),
    "sinks of other rows": (drop("layers.1.sink.slot", "layers.1.sink.key"), r"layers\[1\].*sink holds"),
    "no sinks": (drop(*(f"layers.1.sink.{n}" for n in ("slot", "key", "value"))), r"layers\[1\].*first tokens are mis"),
    "no window": (drop(*(f"layers.1.recent.{n}" for n in ("valid", "key", "value"))), r"layers\[1\].*are stored of 21"),
    "no words": (drop(f"{LAYER}.key.words"), r"layers\[1\].*packed holds"),
    "no keys": (drop("layers.0.keys"), r"layers\[0\].*holds \['values'\]"),
    "stock keys of other heads": (put("layers.0.keys", lambda t: t[:, :1]), r"layers\[0\].*keys are"),
    "stock tokens missing": (put("layers.0.values", lambda t: t[:, :, 1:]), r"layers\[0\].*values are"),
    "stock rows missing": (lambda h, _: [h.update({n: h[n][:1]}) for n in ("layers.0.keys", "layers.0.values")],
                           r"of \[1, 3\] rows"),
    "no positions": (drop("positions.position"), r"positions\.position"),
    "other positions": (put("positions.position", lambda t: t[:, 1:]), r"positions are"),
    "positions of other rows": (put("positions.position", lambda t: t[:2]), r"positions of 2"),
    "a stray tensor": (lambda h, _: h.update(extra=torch.zeros(2)), r"extra"),
    "a stray part": (lambda h, _: h.update({"layers.1.extra": torch.zeros(3, 2)}), r"layers\[1\].*extra"),
    "a stray layer": (lambda h, _: h.update({"layers.9.keys": torch.zeros(2)}), r"layers\.9"),
    "another kind": (state(1, kind="DynamicLayer"), r"layers\[1\].*saved as DynamicLayer, expected packed"),
    "an unknown kind": (state(1, kind="pickle"), r"layers\.1\.kind"),
    "more seen": (state(1, seen=99), r"layers\[1\].*of 99 seen"),
    "other seen": (state(0, seen=99), r"seen \[21, 99\]"),
    "less than nothing": (state(1, seen=-1), r"layers\.1\.seen"),
    "a layer too few": (lambda _, header: header["layers"].pop(), r"1 layers, expected 2"),
    "another format": (lambda _, header: header.update(format="gguf"), r"format"),
    "a later version": (lambda _, header: header.update(format_version=2), r"format_version"),
    "no origin": (lambda _, header: header.pop("origin"), r"origin"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_rewritten_file_is_refused_by_path_and_field(saved, tmp_path, name):
    (model, artifact, _), settings, path, _ = saved
    change, field = HOSTILE[name]
    with pytest.raises(CorruptFile, match=rf"hostile: .*{field}"):
        artifact.load_cache(rewritten(path, tmp_path / "hostile", change), model, **settings)


def test_files_of_others_are_refused(saved, tmp_path):
    (model, artifact, _), settings, _, _ = saved
    save_file({"x": torch.zeros(2)}, tmp_path / "theirs")
    (tmp_path / "text").write_text("once upon a time")
    save_file({"x": torch.zeros(2)}, tmp_path / "list", {METADATA_KEY: json.dumps([1])})
    for file in ("theirs", "text", "list"):
        with pytest.raises(CorruptFile, match=file):
            artifact.load_cache(tmp_path / file, model, **settings)
    with pytest.raises(InputError, match="none: not found"):
        artifact.load_cache(tmp_path / "none", model, **settings)


def test_caches_that_cannot_be_saved_say_why(saved, tmp_path):
    (model, artifact, _), settings, path, _ = saved
    with pytest.raises(ValueError, match="holds no tokens"):
        artifact.new_cache(model, **settings).save(tmp_path / "new")
    with pytest.raises(ValueError, match="no origin"):
        PackedCache(model.config, {}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch):
    _, _, path, cache = saved
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcalib.files.os.fsync", full)
    with pytest.raises(InputError, match=r"prompt\.safetensors: the disk is full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_loading_needs_an_attached_model(saved, case):
    _, _, path, _ = saved
    with pytest.raises(RuntimeError, match=r"not attached.*kvcalib\.attach"):
        kvcalib.load_cache(path, case("llama")[0])
