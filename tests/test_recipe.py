"""Recipes: those we ship are valid; a wrong one is refused by field, value and expectation."""

from pathlib import Path

import pytest

from kvcalib.errors import InputError
from kvcalib.recipe import Recipe, read_recipe

PIPELINES = sorted((Path(__file__).parents[1] / "pipelines").glob("*.yaml"))


def test_recipes_are_there():
    assert "demo.yaml" in [path.name for path in PIPELINES]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path):
    recipe = read_recipe(path)
    assert recipe.evaluate is not None
    assert recipe.run_path != recipe.out


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_and_given_fields(tmp_path):
    recipe = read_recipe(recipe_file(tmp_path, "model: m\nout: a/b\nfit: {key_bits: 2, sinks: 1}\nevaluate:\n"))
    assert recipe == Recipe(model="m", out=Path("a/b"), fit={"key_bits": 2, "sinks": 1}, evaluate=None)
    assert (recipe.fit.key_bits, recipe.fit.value_bits, recipe.fisher.samples) == (2, 3, 16)
    assert recipe.run_path == Path("a/b.run")
    assert read_recipe(recipe_file(tmp_path, "model: m\nout: a\nrun_dir: r\n")).run_path == Path("r")


@pytest.mark.parametrize(
    ("text", "field", "value", "expectation"),
    [
        ("fit: {key_bits: 9}", "fit.key_bits", "9", "less than or equal to 8"),
        ("fit: {value_bits: 0}", "fit.value_bits", "0", "greater than or equal to 1"),
        ("fit: {value_bits: three}", "fit.value_bits", "'three'", "valid integer"),
        ("fit: {outliers: 0.5}", "fit.outliers", "0.5", "less than or equal to 0.05"),
        ("fit: {format: fp4}", "fit.format", "'fp4'", "'nuq', 'nf' or 'int'"),
        ("fit: {granularity: row}", "fit.granularity", "'row'", "'layer', 'head' or 'channel'"),
        ("fisher: {samples: 0}", "fisher.samples", "0", "greater than or equal to 1"),
        ("fisher: {seq_len: 1}", "fisher.seq_len", "1", "greater than or equal to 2"),
        ("evaluate: {sinks: -1}", "evaluate.sinks", "-1", "greater than or equal to 0"),
        ("recent: -1", "recent", "-1", "greater than or equal to 0"),
        ("colour: red", "colour", "'red'", "Extra inputs are not permitted"),
        ("fisher: {smaples: 4}", "fisher.smaples", "4", "Extra inputs are not permitted"),
        ("fisher: 7", "fisher", "7", "valid dictionary"),
    ],
)
def test_error_names_field_value_and_expectation(tmp_path, text, field, value, expectation):
    path = recipe_file(tmp_path, f"model: m\nout: a\n{text}\n")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert f"{path}: {field} is {value}: " in message
    assert expectation in message
    assert "\n" not in message


def test_every_wrong_field_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model: Field required.*fit\.key_bits is 9.*colour is 'red'"):
        read_recipe(recipe_file(tmp_path, "out: a\nfit: {key_bits: 9}\ncolour: red\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected fields"),
        (b"- a\n- b\n", "holds list, expected fields"),
        (b"model: [\n", "not valid YAML"),
        (b"model: \xff\n", "not valid YAML"),
        (b"model: !!python/object/apply:os.system ['false']\nout: a\n", "not valid YAML"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_recipe(path)
