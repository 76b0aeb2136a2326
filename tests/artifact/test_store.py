"""Artifacts on disk: the same bytes each time, every damage found, nothing lost when a write fails."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvcalib
from kvcalib.artifact import store
from kvcalib.artifact.manifest import (
    Calibration,
    FitSettings,
    LayerSpec,
    Manifest,
    Producer,
    RuntimeDefaults,
    TensorSpec,
)
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from kvcalib.model.identity import ModelIdentity
from kvcalib.quant.packing import Layout

HEADS, DIM, BITS = 2, 8, 3
FILES = {"manifest.json", "tensors.safetensors", "README.md"}
ROOT = Path(__file__).parents[2]


def example(seed: int = 0):
    """A small but complete artifact: one layer, 3 bit, 2 heads of 8."""
    layout = Layout.build(torch.full((HEADS, DIM), BITS))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for role in ("key", "value"):
        centroids = torch.randn(HEADS * DIM, 1 << BITS, generator=generator).sort(dim=1).values
        weight = torch.rand(HEADS, DIM, generator=generator)
        named = {"widths": layout.widths, "codebook": centroids.flatten(), "word": layout.word, "shift": layout.shift}
        named |= {"weight": weight, "feedback": torch.randn(HEADS, DIM * (DIM - 1) // 2, generator=generator)}
        if role == "value":
            named["basis"] = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q
        tensors |= {f"layers.0.{role}.{name}": t.clone() for name, t in named.items()}
    spec = TensorSpec(
        kv_heads=HEADS, head_dim=DIM, words=layout.words, segment=layout.segment, scope="token", outliers=1,
        feedback=True, basis=False, mean_bits=BITS, predicted_loss=1.25e-05,
    )  # fmt: skip
    manifest = Manifest(
        producer=Producer(version="0.1.0"),
        model=ModelIdentity(
            name="tiny", model_type="llama", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=97,
            rope_parameters_sha256="0" * 64, weights_sha256="1" * 64,
        ),
        calibration=Calibration(
            data="builtin", sequences=2, tokens=32, sampled_tokens=32, seq_len=16, seed=0, nll=4.5, fingerprint="2" * 64
        ),
        fit=FitSettings(
            format="nuq", weights="fisher_scale", key_granularity="channel", value_granularity="head", outliers=0.01,
            sinks=0, qnorm=False, solver="exact",
        ),
        runtime=RuntimeDefaults(),
        layers=[LayerSpec(index=0, key=spec, value=spec.model_copy(update={"basis": True}))],
        tensors={},
        files={},
    )  # fmt: skip
    return manifest, tensors


def write(folder: Path, seed: int = 0, overwrite: bool = False, **replaced: torch.Tensor) -> Path:
    manifest, tensors = example(seed)
    store.write(folder, manifest, tensors | replaced, f"# Card {seed}\n", overwrite)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(folder: Path, change) -> None:
    """Change the manifest's fields and give it the digest that fits, as a writer with a bug would."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)

    def render(value) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    path.write_bytes(render(body | {"digest": hashlib.sha256(render(body)).hexdigest()}))


@pytest.fixture
def artifact(tmp_path) -> Path:
    return write(tmp_path / "artifact")


# The same artifact


def test_round_trip(artifact):
    expected, tensors = example()
    manifest, found = store.read(artifact)
    assert set(contents(artifact)) == FILES
    assert manifest.model_copy(update={"tensors": {}, "files": {}}) == expected
    assert found.keys() == tensors.keys() == manifest.tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    loaded = kvcalib.load(artifact)
    codes = loaded.quantizers[0]["key"].codebook.encode(torch.zeros(1, HEADS, DIM))
    assert codes.shape == (1, HEADS, DIM)


def test_same_input_same_bytes(tmp_path):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b"))
    assert (
        contents(write(tmp_path / "c", seed=1))["tensors.safetensors"]
        != contents(tmp_path / "a")["tensors.safetensors"]
    )


def test_same_bytes_in_processes_with_other_hash_seeds(tmp_path):
    code = "import sys; from pathlib import Path; from tests.artifact.test_store import write; write(Path(sys.argv[1]))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / seed)], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(write(tmp_path / "here"))


# Damage


@pytest.mark.parametrize("name", sorted(FILES))
def test_any_flipped_byte_is_found(artifact, name):
    path, chance = artifact / name, random.Random(0)
    intact = path.read_bytes()
    missed = []
    # All of a short file; of a long one its first bytes (the header's metadata) and a sample.
    positions = chance.sample(range(len(intact)), min(len(intact), 500))
    for position in sorted({*range(min(len(intact), 150)), *positions}):
        damaged = bytearray(intact)
        damaged[position] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            store.read(artifact)
            missed.append(f"byte {position}: not found")
        except InputError:
            pass
        except Exception as error:
            missed.append(f"byte {position} ({intact[position : position + 1]!r}): {type(error).__name__}: {error}")
    assert not missed, f"{len(missed)} flips in {name}: {missed[:5]}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_truncated_file_is_found(artifact, name):
    path = artifact / name
    intact = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(intact) // 2, len(intact) - 1} & set(range(len(intact))):
        path.write_bytes(intact[:length])
        with pytest.raises(InputError, match=name):
            store.read(artifact)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file_is_named(artifact, name):
    (artifact / name).unlink()
    with pytest.raises(InputError, match=name):
        store.read(artifact)


@pytest.mark.parametrize("name", ["tensors.safetensors", "README.md"])
def test_appended_byte_is_found(artifact, name):
    with open(artifact / name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(CorruptFile, match=name):
        store.read(artifact)


@pytest.mark.parametrize("version", [1, 2, 3, 5, 0, "4", None, 2.5])
def test_unknown_version_is_named(artifact, version):
    rewrite(artifact, lambda body: body.update(format_version=version))
    with pytest.raises(CorruptFile, match=rf"format_version is {version!r}, this kvcalib reads 4"):
        store.read(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(colour="red"), "colour"),
        (lambda b: b["layers"][0]["key"].update(colour="red"), r"layers\.0\.key\.colour"),
        (lambda b: b["fit"].pop("solver"), r"fit\.solver"),
        (lambda b: b["layers"][0]["key"].update(mean_bits=9), r"layers\.0\.key\.mean_bits is 9"),
        (lambda b: b.update(format="other"), "format"),
        (lambda b: b["tensors"].pop("layers.0.key.word"), r"layers\.0\.key\.word"),
        (lambda b: b["tensors"]["layers.0.key.word"].update(dtype="int32"), r"layers\.0\.key\.word\.dtype"),
        (lambda b: b["tensors"]["layers.0.key.word"].update(shape=[1]), r"layers\.0\.key\.word\.shape"),
        (lambda b: b["files"].update({"../secret": "0" * 64}), "secret"),
        (lambda b: b["calibration"].update(nll=float("nan")), "manifest.json"),
        (lambda b: b["layers"][0]["key"].update(predicted_loss=float("inf")), "manifest.json"),
        (lambda b: b.update(layers={}), "layers"),
    ],
)
def test_wrong_field_is_named(artifact, change, message):
    rewrite(artifact, change)
    with pytest.raises(CorruptFile, match=message):
        store.read(artifact)


def test_number_too_large_for_a_float_is_found(artifact):
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"1.25e-05", b"1.25e905"))
    with pytest.raises(CorruptFile):
        store.read(artifact)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "kvcalib-artifact"}']
)
def test_manifest_that_is_none(artifact, text):
    (artifact / "manifest.json").write_bytes(text)
    with pytest.raises(CorruptFile, match=r"manifest\.json"):
        store.read(artifact)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("codebook", lambda t: t.index_fill(0, torch.tensor([5]), torch.nan)),
        ("codebook", lambda t: t.index_fill(0, torch.tensor([5]), torch.inf)),
        ("codebook", lambda t: t[:-1]),
        ("codebook", lambda t: t.flip(0)),
        ("widths", lambda t: t.T.contiguous()),
        ("widths", lambda t: t[:, :-1].contiguous()),
        ("widths", lambda t: t + 6),
        ("word", lambda t: t[:1]),
        ("word", lambda t: t[0]),
        ("word", lambda t: t + 100),
        ("word", torch.zeros_like),
        ("shift", lambda t: t[..., :-1].contiguous()),
        ("shift", lambda t: t + 30),
        ("weight", lambda t: t[:, :-1].contiguous()),
        ("weight", lambda t: t * torch.nan),
        ("weight", lambda t: t - 10),
    ],
)
@pytest.mark.parametrize("role", ["key", "value"])
def test_tensor_that_cannot_be_used(tmp_path, role, name, bad):
    """The hashes fit: such an artifact was written so."""
    full = f"layers.0.{role}.{name}"
    folder = write(tmp_path / "a", **{full: bad(example()[1][full])})
    with pytest.raises(CorruptFile, match=rf"layers(\[0\]|\.0)\.{role}"):
        kvcalib.load(folder)


def test_layer_without_its_tensors(tmp_path):
    manifest, tensors = example()
    del tensors["layers.0.value.codebook"]
    store.write(tmp_path / "a", manifest, tensors, "card")
    with pytest.raises(CorruptFile, match="codebook"):
        kvcalib.load(tmp_path / "a")


def test_no_artifact_there(tmp_path):
    with pytest.raises(InputError, match="no artifact"):
        store.read(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        kvcalib.load(tmp_path / "missing")


# What may be replaced


def test_identical_artifact_is_left_alone(artifact):
    before = {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()}
    write(artifact)
    assert {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()} == before


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    store.read(write(tmp_path / "a"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", [["thesis.txt"], ["thesis.txt", *sorted(FILES)], ["README.md"]])
def test_foreign_files_are_never_replaced(tmp_path, files, overwrite):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FolderInUse, match=files[0]):
        write(folder, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FolderInUse, match="is a file"):
        write(tmp_path / "a", overwrite=True)
    assert contents(tmp_path) == {"a": b"mine"}


def test_other_artifact_is_replaced_only_when_told(tmp_path, artifact):
    before = contents(tmp_path)
    with pytest.raises(FolderInUse, match="--overwrite"):
        write(artifact, seed=1)
    assert contents(tmp_path) == before
    write(artifact, seed=1, overwrite=True)
    assert contents(artifact) == contents(write(tmp_path / "fresh", seed=1))
    assert {p.name for p in tmp_path.iterdir()} == {"artifact", "fresh"}


# A write that fails


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
@pytest.mark.parametrize("previous", [True, False])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call, previous):
    folder = tmp_path / "artifact"
    if previous:
        write(folder)
    before = contents(tmp_path)
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    elif call == "mkdir":
        monkeypatch.setattr(os, "mkdir", full_disk)
    else:
        refuse_rename_onto(folder, monkeypatch)
    with pytest.raises(InputError, match="the disk is full, nothing was changed"):
        write(folder, seed=1, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == ({"artifact"} if previous else set())


def refuse_rename_onto(folder: Path, monkeypatch) -> None:
    """The new artifact cannot take its place, once; putting the old one back can work."""
    calls = {name: getattr(os, name) for name in ("rename", "replace")}
    left = [1]

    def guarded(name):
        def move(source, target, *args, **kwargs):
            if Path(target) == folder and left:
                left.pop()
                full_disk()
            return calls[name](source, target, *args, **kwargs)

        return move

    for name in calls:
        monkeypatch.setattr(os, name, guarded(name))


def test_interrupted_write_leaves_no_trace(tmp_path, monkeypatch, artifact):
    before = contents(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(artifact, seed=1, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before
