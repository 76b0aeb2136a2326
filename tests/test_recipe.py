"""Recipes: those we ship are valid; a wrong one is refused by field, value and expectation."""

from pathlib import Path

import pytest

from kvcalib.errors import InputError
from kvcalib.recipe import Recipe, read_recipe
from kvcalib.stages.allocate import AllocateSettings
from kvcalib.stages.sweep_grid import read_grid

SHIPPED = sorted((Path(__file__).parents[1] / "pipelines").glob("*.yaml"))
GRIDS = [path for path in SHIPPED if "\ngrid:" in path.read_text()]
PIPELINES = [path for path in SHIPPED if path not in GRIDS]


def test_recipes_are_there():
    assert "demo.yaml" in [path.name for path in PIPELINES]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path):
    recipe = read_recipe(path)
    assert recipe.evaluate is not None
    assert recipe.run_path != recipe.out


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grid_is_valid(path):
    assert len(read_grid(path).points) > 10


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_and_given_fields(tmp_path):
    recipe = read_recipe(recipe_file(tmp_path, "model: m\nout: a/b\nfit: {key_bits: 2, sinks: 1}\nevaluate:\n"))
    assert recipe == Recipe(model="m", out=Path("a/b"), fit={"key_bits": 2, "sinks": 1}, evaluate=None)
    assert (recipe.fit.key_bits, recipe.fit.value_bits, recipe.fisher.samples) == (2, 3, 16)
    assert (recipe.bits, recipe.allocate) == (None, None)
    assert recipe.run_path == Path("a/b.run")
    assert read_recipe(recipe_file(tmp_path, "model: m\nout: a\nrun_dir: r\n")).run_path == Path("r")


@pytest.mark.parametrize(
    ("text", "bits", "spending"),
    [
        ("", 2.5, {"budget": 2.5}),
        ("bits: 3", 3.0, {"budget": 3.0}),
        ("bits: '3.25'", 3.25, {"budget": 3.25}),
        ("bits: 3.1\nallocate: {per: head}", 3.1, {"budget": 3.1, "per": "head"}),
        ("allocate: {group: 0}", 2.5, {"budget": 2.5, "group": 0}),
        ("allocate: {budget: 4}", 4.0, {"budget": 4.0}),
        ("allocate: {budget: 4}\nbits: 4.0", 4.0, {"budget": 4.0}),
        ("allocate: {widths: 2}", None, {"widths": 2.0}),
        ("fit: {value_bits: 4}", None, None),
        ("allocate:", None, None),
    ],
)
def test_one_dial(tmp_path, text, bits, spending):
    recipe = read_recipe(recipe_file(tmp_path, f"model: m\nout: a\n{text}\n"))
    assert recipe.bits == bits
    assert recipe.allocate == (None if spending is None else AllocateSettings(**spending))
    assert Recipe.model_validate(recipe.model_dump(exclude_unset=True)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 3\nfit: {key_bits: 3}", "fit.key_bits and bits are both given"),
        ("allocate: {per: head}\nfit: {value_bits: 3}", "fit.value_bits and allocate are both given"),
        ("bits: 3\nallocate: {widths: 2}", "bits is 3 and allocate.widths is 2; leave one"),
        ("bits: 3\nallocate: {budget: 2}", "bits is 3 and allocate.budget is 2; leave one"),
        ("allocate: {budget: 2, widths: 2}", "allocate is .*give one of"),
        ("allocate: {per: row}", "allocate.per is 'row': .*'layer', 'head' or 'channel'"),
        ("allocate: {budget: -1}", r"recipe.yaml: allocate.budget is -1: Input should be greater than 0$"),
        ("bits: -1", "recipe.yaml: bits is -1: Input should be greater than 0$"),
        ("bits: many\nallocate: {per: head}", "recipe.yaml: bits is 'many': .*valid number[^;]*$"),
        ("allocate: 3", "allocate is 3: .*valid dictionary"),
    ],
)
def test_dials_that_exclude_each_other_or_are_wrong(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_recipe(recipe_file(tmp_path, f"model: m\nout: a\n{text}\n"))


def test_changed_keeps_what_was_given(tmp_path):
    text = "model: m\nout: a\nallocate: {per: head, budget: 4}\nfisher: {samples: 3}\nfit: {sinks: 2}\n"
    recipe = read_recipe(recipe_file(tmp_path, text))
    other = recipe.changed(bits=3.5, out=Path("b"), fisher={"seq_len": 64}, evaluate={"seq_len": 32})
    assert other.allocate == AllocateSettings(budget=3.5, per="head")
    assert (other.bits, other.out, other.fit.sinks) == (3.5, Path("b"), 2)
    assert (other.fisher.samples, other.fisher.seq_len, other.evaluate.seq_len) == (3, 64, 32)
    uniform = other.changed(key_bits=4)
    assert (uniform.bits, uniform.allocate, uniform.fit.key_bits, uniform.fit.sinks) == (None, None, 4, 2)
    assert uniform.changed(value_bits=2).fit.bits == {"key": 4, "value": 2}
    assert uniform.changed(bits=3).allocate == AllocateSettings(budget=3)
    assert recipe.changed() == recipe
    with pytest.raises(ValueError, match="key_bits and bits are both given"):
        recipe.changed(bits=3, key_bits=3)


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
