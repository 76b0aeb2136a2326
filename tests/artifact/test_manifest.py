"""The manifest's JSON schema: checked in, true of real manifests, refusing what the reader refuses."""

import json

import jsonschema
import pytest
from pydantic import ValidationError

from kvcalib.artifact.manifest import Friendliness, Manifest, Refined, decode, schema
from tests.artifact.test_store import ROOT, example, write


@pytest.fixture
def validator():
    described = json.loads(schema())
    kind = jsonschema.validators.validator_for(described, jsonschema.Draft202012Validator)
    kind.check_schema(described)
    return kind(described)


@pytest.fixture
def body(tmp_path) -> dict:
    return json.loads((write(tmp_path / "a") / "manifest.json").read_text())


def test_schema_in_docs_is_the_code(validator):
    checked_in = (ROOT / "docs/artifact.schema.json").read_text()
    assert checked_in == schema(), "run: python -m kvcalib.artifact.manifest > docs/artifact.schema.json"


def test_real_manifest_fits(validator, body):
    validator.validate(body)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(colour="red"),
        lambda b: b["model"].update(colour="red"),
        lambda b: b["layers"][0]["key"].update(colour="red"),
        lambda b: b["layers"][0]["key"].update(mean_bits=9),
        lambda b: b["layers"][0]["key"].update(words="many"),
        lambda b: b.update(format_version=5),
        lambda b: b.pop("digest"),
        lambda b: b.pop("model"),
        lambda b: b["calibration"].update(fingerprint="short"),
    ],
)
def test_wrong_manifest_does_not_fit(validator, body, change):
    change(body)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(body)


def test_encoding_is_canonical():
    manifest, _ = example()
    raw = manifest.encode()
    body = json.loads(raw)
    assert raw == (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
    del body["digest"]
    assert Manifest.model_validate(body).encode() == raw


def test_a_refinement_is_written_where_there_is_one(validator):
    manifest, _ = example()
    assert "refined" not in json.loads(manifest.encode())
    refined = Refined(
        steps=20, data="builtin", fingerprint="3" * 64, held_out_fingerprint="4" * 64, kld_before=0.02, kld_after=0.01,
        lr=0.05, seed=0,
    )  # fmt: skip
    raw = manifest.model_copy(update={"refined": refined}).encode()
    body = json.loads(raw)
    assert body["refined"]["kld_after"] == 0.01
    validator.validate(body)
    assert decode(raw, body).refined == refined


def befriended(**figures):
    """The example's manifest with these figures of friendliness."""
    manifest, _ = example()
    friendliness = Friendliness(key_error=0.1, value_error=0.2, **figures)
    return manifest.model_copy(
        update={"layers": [manifest.layers[0].model_copy(update={"friendliness": friendliness})]}
    )


def test_figures_that_are_not_known_are_not_written():
    """So an artifact of before they existed has the bytes that it had."""
    body = json.loads(befriended().encode())
    assert body["layers"][0]["friendliness"] == {"key_error": 0.1, "value_error": 0.2}
    del body["digest"]
    assert Manifest.model_validate(body) == befriended()
    assert json.loads(example()[0].encode())["layers"][0]["friendliness"] is None


def test_figures_of_eviction_are_written_and_read(validator):
    figures = {"key_by_head": [0.1, 0.1], "value_by_head": [0.1, 0.3], "overlap": 0.9, "alpha": 1.0, "share": 0.5}
    raw = befriended(**figures).encode()
    body = json.loads(raw)
    validator.validate(body)
    assert body["layers"][0]["friendliness"] == {"key_error": 0.1, "value_error": 0.2, **figures}
    del body["digest"]
    assert Manifest.model_validate(body).encode() == raw


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"overlap": -0.1}, "overlap"),
        ({"share": 0.0}, "share"),
        ({"key_by_head": [0.1]}, r"layers\[0\].friendliness.key_by_head has 1 entries, expected one for each of the 2"),
        ({"value_by_head": [0.1, -0.1]}, "value_by_head"),
    ],
)
def test_wrong_figures_are_refused(figure, message):
    body = json.loads(befriended().encode())
    del body["digest"]
    body["layers"][0]["friendliness"] |= figure
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(body)


def test_mean_bits_counts_channels():
    manifest, _ = example()
    layer = manifest.layers[0]
    wide = layer.model_copy(update={"key": layer.key.model_copy(update={"mean_bits": 6.0, "kv_heads": 6})})
    assert manifest.mean_bits == (3.0, 3.0)
    # 2 heads of 3 bit and 6 heads of 6 bit: (2 * 3 + 6 * 6) / 8
    assert manifest.model_copy(update={"layers": [layer, wide]}).mean_bits == (5.25, 3.0)
