"""Models and data sets of the Hub are taken of one commit, against a small Hub on this machine."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants

from kvcalib.demo import MODEL_DIR
from kvcalib.errors import InputError
from kvcalib.model import revision as revisions
from kvcalib.model.identity import identify
from kvcalib.model.loading import load_model, load_tokenizer
from kvcalib.model.revision import commit_of
from kvcalib.model.text import load_hub_dataset, pinned_source
from tests.artifact.test_hub import reach
from tests.hub_server import serve
from tests.tiny import tiny_llama

NAME = "someone/tiny"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "_KNOWN", {})
    with serve() as found:
        reach(monkeypatch, tmp_path, found.url)
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of the Hub: the tiny one with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    for path in MODEL_DIR.glob("token*"):
        shutil.copy(path, folder / path.name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked_for(server):
    """The revisions that the content of files was asked of."""
    return {path.split("/resolve/")[1].split("/")[0] for _, path in server.requests if "/resolve/" in path}


def test_all_files_are_of_one_commit_although_the_branch_moves(server, files):
    repo = server.repo(NAME, files)
    first = repo.branches["main"]
    tokenizer = load_tokenizer(NAME)
    # Between tokenizer and model somebody pushes another model.
    repo.commit(files | {"config.json": b"{}", "model.safetensors": b""})
    model = load_model(NAME)
    assert asked_for(server) == {first}
    assert identify(model).revision == first
    assert identify(model).name == NAME
    assert tokenizer("a").input_ids
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_a_branch_and_a_commit_are_taken_by_name(server, files):
    repo = server.repo(NAME, {"config.json": b"{}"})
    other = repo.commit(files, branch="other")
    assert identify(load_model(NAME, revision="other")).revision == other
    assert commit_of(NAME, other) == other
    assert asked_for(server) == {other}
    assert commit_of(NAME, "none") is None
    assert commit_of("someone/nothing") is None
    assert commit_of("../secret") is None


def test_without_a_connection_the_copys_commit_is_used(server, files, monkeypatch):
    repo = server.repo(NAME, files)
    first = repo.branches["main"]
    load_model(NAME)
    repo.commit(files | {"config.json": b"{}"})
    monkeypatch.setattr(revisions, "_KNOWN", {})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert commit_of(NAME) == first
    assert identify(load_model(NAME)).revision == first
    assert commit_of(NAME, "../../x") is None


def test_data_sets_are_pinned_and_recorded(server, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None, **given):
        asked.append((name, given["revision"]))
        return iter([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    repo = server.repo("datasets/someone/texts", {"a.txt": b"a"})
    first = repo.branches["main"]
    named = pinned_source("someone/texts:train:text")
    assert named == f"someone/texts@{first}:train:text"
    assert pinned_source("someone/texts@main") == f"someone/texts@{first}"
    assert pinned_source(named) == named
    repo.commit({"a.txt": b"b"})
    for name in ("someone/texts", "someone/texts@main", f"someone/texts@{first}"):
        assert list(load_hub_dataset(name, None, "train")) == [{"text": "a"}]
    assert asked == [("someone/texts", first)] * 3


@pytest.mark.parametrize("source", ["builtin", "wikitext2", "c4", "/a/b", "./a/b", "~/a", "a", "someone/none", "a b/c"])
def test_what_is_no_data_set_of_the_hub_stays_as_it_is(server, source):
    assert pinned_source(source) == source


# Code that a model brings

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("it ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_is_not_run_unless_the_flag_is_given(tmp_path, files, monkeypatch, load):
    folder, mark = tmp_path / "own", tmp_path / "mark"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = json.loads(files["config.json"])
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(InputError, match=r"Python code of its own, which is not run; .* --trust-remote-code"):
        load(str(folder))
    assert not mark.exists()
    if load is load_model:
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        assert type(load_model(str(folder), trust_remote_code=True)).__name__ == "OwnModel"
        assert mark.read_text() == "it ran"
