"""The card: what it says, and that no name in it can say more."""

import re

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from kvcalib.artifact.card import Measured, card, effective_bits, plain
from kvcalib.artifact.manifest import Budget, Friendliness
from kvcalib.errors import InputError
from kvcalib.runtime.loader import load
from tests.artifact.test_store import example, write

HOSTILE = (
    "a\n---\nlicense: mit\n---\n# Owned",
    "x: [1, 2] # y",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![i](http://evil.example/i.png)",
    "a | b | c",
    "`code` **bold** _it_ ~~s~~ $x$",
    "https://evil.example and www.evil.example @someone #1",
    "line\r\n\r\n# Heading\u2028next\u0000\u202etxt",
    "1. list\n- item\n> quote",
    "&lt;b&gt; \\",
    "| a |\n|---|\n| b |",
)
MEASURED = Measured("On text.", ["contender", "KLD"], [["fp16", "0"], ["mine", "0.1 (0.0 to 0.2)"]], "mine")


def named(name: str, **model):
    manifest, _ = example()
    identity = manifest.model.model_copy(update={"name": name, **model})
    source = manifest.calibration.model_copy(update={"data": name})
    return manifest.model_copy(update={"model": identity, "calibration": source})


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_same_manifest_same_card():
    assert card(named("a/b"), MEASURED, "mit") == card(named("a/b"), MEASURED, "mit")


def test_front_matter():
    fields = front(card(named("meta-llama/Llama-3.1-8B")))
    assert fields == {
        "library_name": "kvcalib", "tags": ["kv-cache", "quantization", "kvcalib"],
        "base_model": "meta-llama/Llama-3.1-8B",
    }  # fmt: skip
    assert front(card(named("a/b"), license="apache-2.0"))["license"] == "apache-2.0"
    assert "base_model" not in front(card(named("a-local-folder")))


@pytest.mark.parametrize("license", ["", "MIT license", "mit\nbase_model: x/y", "a" * 80])
def test_licenses_are_identifiers(license):
    with pytest.raises(InputError, match="--license"):
        card(named("a/b"), license=license)


def test_figures():
    manifest, _ = example()
    text = card(manifest)
    key = manifest.layers[0].key
    assert "| code width | keys 3.00, values 3.00 bit, nuq |" in text
    loss = f"{key.predicted_loss:.1e}"
    assert f"| 0 | 3.00 | 3.00 | {loss} | {loss} | | |" in text
    assert "No comparison was attached" in text
    assert f"{100 * 1 / 16:.3g} % of a token's elements" in text
    # one outlier of 16 + 8 bits in both, and a position, over 2 x 16 elements
    assert effective_bits(manifest) == (2 * 32 * key.words + 2 * 24 + 32) / 32
    # values that are kept as they are have a zero and scale too
    as_they_are = manifest.layers[0].model_copy(update={"value": key})
    scaled = manifest.model_copy(update={"layers": [as_they_are]})
    assert effective_bits(scaled) == effective_bits(manifest) + 32 / 32
    assert "Values: along their principal axes." in text
    assert "Values: as they are, with zero and scale." in card(scaled)
    friendly = Friendliness(key_error=0.125, value_error=0.25)
    told = manifest.layers[0].model_copy(update={"friendliness": friendly})
    assert "| 0.125 | 0.250 |" in card(manifest.model_copy(update={"layers": [told]}))
    planned = manifest.model_copy(update={"budget": Budget(asked=3, planned=2.9876)})
    assert "| effective bits of a long cache | 2.988, 3 asked for |" in card(planned)


def test_effective_bits_are_those_of_a_cache(tmp_path):
    """The figure without a budget is what a cache of the same quantizers takes of a token."""
    artifact = load(write(tmp_path / "a"))
    bits = 32
    for quantizer in artifact.quantizers[0].values():
        for shape, dtype in quantizer.row_spec(torch.float16).values():
            bits += torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size() * 8
    assert effective_bits(artifact.manifest) == bits / 32


def test_comparison():
    text = card(named("a/b"), MEASURED)
    assert "| contender | KLD |\n|---|--:|\n| fp16 | 0 |\n| **mine** | **0.1 (0.0 to 0.2)** |" in text


@pytest.mark.parametrize(
    ("data", "shown"),
    [("/home/me/text.jsonl", "text.jsonl"), ("~/t.txt", "t.txt"), ("owner/name:train", "owner/name:train")],
)
def test_a_paths_folders_are_left_out(data, shown):
    manifest, _ = example()
    source = manifest.calibration.model_copy(update={"data": data})
    assert f"Text: {shown};" in card(manifest.model_copy(update={"calibration": source}))


# Escaping


def tokens(markdown: str) -> list:
    parser = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    return [t for block in parser.parse(markdown) for t in [block, *(block.children or [])]]


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_only_text(text):
    kinds = [t.type for t in tokens(f"Of {plain(text)}, then.")]
    assert set(kinds) == {"paragraph_open", "inline", "text", "paragraph_close"} | ({"text_special"} & set(kinds)), (
        kinds
    )
    row = tokens(f"| a |\n|---|\n| {plain(text)} |")
    assert sum(t.type == "td_open" for t in row) == 1
    assert not {t.type for t in row} & {"link_open", "image", "html_inline", "strong_open", "code_inline", "s_open"}
    # Linkifiers of other readers look for these.
    assert not re.search(r"://|www\.|@", plain(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_change_nothing_but_their_own_place(text):
    usual, hostile = (
        card(named(name, revision=name), Measured(name, ["h", name], [[name, name]], name)) for name in ("n", text)
    )
    assert front(hostile) == front(usual)
    shapes = [[t.type for t in tokens(c) if not t.type.startswith("text")] for c in (usual, hostile)]
    assert shapes[0] == shapes[1]
    assert hostile.count("\n---\n") == usual.count("\n---\n")


def test_names_read_as_they_are():
    shown = "".join(t.content for t in tokens(plain("Llama_3*[8B] <&> `x`")) if t.type.startswith("text"))
    assert shown == "Llama_3*[8B] <&> `x`"
