"""The Hub, with huggingface_hub's own client against a small Hub on this machine (tests/hub_server.py)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import kvcalib
from kvcalib.artifact import hub, store
from kvcalib.errors import CorruptFile, FolderInUse, InputError
from tests.artifact.test_store import contents, write
from tests.hub_server import serve

NAME = "someone/llama-nuq3"
ROOT = Path(__file__).parents[2]
TOKEN = "hf_test"  # of the server that the test starts


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serve() as found:
        found.writers.add(TOKEN)
        reach(monkeypatch, tmp_path, found.url)
        yield found


def reach(monkeypatch, tmp_path, url):
    """The client, which read its environment when it was imported, talks to `url` and keeps its copies in tmp_path."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def log_in(tmp_path):
    (tmp_path / "token").write_text(TOKEN)


@pytest.fixture
def artifact(tmp_path):
    return write(tmp_path / "artifact")


def published(server, artifact, **more):
    return server.repo(NAME, contents(artifact) | more)


# Names


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("a/b", None, ("a/b", None)),
        ("a/b@v1", None, ("a/b", "v1")),
        ("a/b@refs/pr/1", None, ("a/b", "refs/pr/1")),
        ("a/b", "v1", ("a/b", "v1")),
        ("a/b@v1", "v1", ("a/b", "v1")),
        ("a-b/c_d.e@x@y", None, ("a-b/c_d.e", "x@y")),
    ],
)
def test_parse(name, revision, expected):
    found = hub.parse(name, revision)
    assert (found.repo, found.revision) == expected


@pytest.mark.parametrize(
    "name", ["", "a", "a/b/c", "./a/b", "/a/b", "~/a", "a/b@", "@v1", "a b/c", "a/", "../b", "a/.b"]
)
def test_parse_refuses(name):
    with pytest.raises(InputError, match="is no Hub id, expected owner/name"):
        hub.parse(name)
    with pytest.raises(InputError, match="no such folder"):
        hub.locate(name or "nothing")


def test_two_revisions_are_refused():
    with pytest.raises(InputError, match=r"'v1'.*'v2'"):
        hub.parse("a/b@v1", "v2")


def test_a_folder_with_an_at_in_its_name_wins(tmp_path, monkeypatch):
    folder = write(tmp_path / "owner" / "name@v1")
    monkeypatch.chdir(tmp_path)
    assert hub.locate("owner/name@v1") == Path("owner/name@v1")
    assert kvcalib.load("owner/name@v1").path == Path("owner/name@v1")
    assert kvcalib.load(folder).path == folder


# Fetching


def test_load_by_name_branch_and_commit(server, artifact, tmp_path):
    repo = published(server, artifact)
    first = repo.branches["main"]
    repo.commit(contents(write(tmp_path / "other", seed=1)), branch="other")
    expected = store.read_manifest(artifact)
    assert kvcalib.load(NAME).manifest == expected
    assert kvcalib.load(f"{NAME}@{first}").manifest == expected
    assert kvcalib.load(f"{NAME}@other").manifest == store.read_manifest(tmp_path / "other")
    assert kvcalib.load(NAME, revision="other").manifest == store.read_manifest(tmp_path / "other")


def test_pull_pins_the_commit_and_takes_only_the_artifacts_files(server, artifact, tmp_path):
    export = b'{"backend": "hqq"}\n'
    foreign = {"model.safetensors": b"weights", "run.sh": b"#!", "exports/other.json": b"{}", "exports/a/b": b""}
    repo = published(server, artifact, **{"exports/cache_config.json": export}, **foreign)
    manifest, commit = hub.pull(hub.parse(NAME), tmp_path / "out")
    assert commit == repo.branches["main"]
    assert manifest == store.read_manifest(artifact)
    assert contents(tmp_path / "out") == contents(artifact) | {"exports/cache_config.json": export}
    assert server.fetched() == {*contents(artifact), "exports/cache_config.json"}
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    hub.pull(hub.parse(NAME), tmp_path / "out")  # the same again is no conflict


def test_pull_replaces_nothing_unasked(server, artifact, tmp_path):
    published(server, artifact)
    there = write(tmp_path / "out", seed=1)
    before = contents(there)
    with pytest.raises(FolderInUse, match="another artifact"):
        hub.pull(hub.parse(NAME), there)
    assert contents(there) == before
    hub.pull(hub.parse(NAME), there, overwrite=True)
    assert contents(there) == contents(artifact)


def test_damaged_files_are_not_installed(server, artifact, tmp_path):
    files = contents(artifact)
    body = bytearray(files["tensors.safetensors"])
    body[-1] ^= 1
    server.repo(NAME, files | {"tensors.safetensors": bytes(body)})
    with pytest.raises(CorruptFile, match="sha256"):
        hub.pull(hub.parse(NAME), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if ".tmp" in p.name] == []


def test_a_damaged_copy_is_fetched_again(server, artifact, tmp_path):
    published(server, artifact)
    copy = hub.fetch(hub.parse(NAME)).folder / "tensors.safetensors"
    blob = copy.resolve()
    blob.write_bytes(b"\0" * blob.stat().st_size)
    hub.pull(hub.parse(NAME), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(artifact)


def test_without_a_connection_the_copy_is_used(server, artifact, tmp_path, monkeypatch):
    repo = published(server, artifact)
    hub.fetch(hub.parse(f"{NAME}@main"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    commit = repo.branches["main"]
    assert hub.fetch(hub.parse(f"{NAME}@{commit}")).commit == commit
    assert kvcalib.load(f"{NAME}@{commit}").manifest == store.read_manifest(artifact)
    with pytest.raises(InputError, match=r"cannot be reached.*HF_HUB_OFFLINE"):
        hub.fetch(hub.parse("someone/else"))


def test_no_connection(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reach(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match=r"a/b: no such folder here, and the Hub cannot be reached"):
        hub.locate("a/b")


def test_what_is_not_there_is_named(server, artifact, tmp_path):
    published(server, artifact)
    server.repo("someone/model", {"config.json": b"{}", "model.safetensors": b""})
    server.repo("someone/secret", contents(artifact), private=True)
    server.repo("someone/gated", contents(artifact), gated=True)
    for name, message in (
        ("someone/nothing", "no such repository on the Hub"),
        (f"{NAME}@v9", "no revision 'v9'"),
        ("someone/model", r"no artifact of kvcalib \(no manifest.json\)"),
        ("someone/secret", "if it is private, log in with `hf auth login`"),
        ("someone/gated", "accept its terms"),
        ("no--body/x", "no name that the Hub allows"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            hub.locate(name)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    log_in(tmp_path)
    with pytest.raises(InputError, match="no such repository on the Hub"):
        hub.locate("someone/nothing")
    assert hub.locate("someone/secret").is_dir()


# Publishing


def test_push_then_pull_gives_the_same_files(server, artifact, tmp_path):
    log_in(tmp_path)
    (artifact / "exports").mkdir()
    (artifact / "exports" / "cache_config.json").write_bytes(b"{}\n")
    (artifact / "exports" / "notes.txt").write_text("mine")
    (artifact / "secret.txt").write_text("mine")
    commit = hub.push(store.contents(artifact)[1], hub.parse(NAME), message="First")
    repo = server.repos[NAME]
    assert repo.branches["main"] == commit
    assert server.summaries == ["First"]
    expected = {n: d for n, d in contents(artifact).items() if n not in ("secret.txt", "exports/notes.txt")}
    assert {n: d for n, d in repo.commits[commit].items() if n != ".gitattributes"} == expected
    hub.pull(hub.parse(f"{NAME}@{commit}"), tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_push_to_a_branch_removes_stale_exports_and_leaves_main(server, artifact, tmp_path):
    log_in(tmp_path)
    repo = published(server, artifact, **{"exports/cache_config.json": b"old", "paper.pdf": b"kept"})
    main = repo.branches["main"]
    other = write(tmp_path / "other", seed=1)
    hub.push(store.contents(other)[1], hub.parse(NAME, "v2"))
    assert repo.branches["main"] == main
    assert repo.commits[repo.branches["v2"]] == contents(other) | {"paper.pdf": b"kept"}


def test_push_makes_private_repositories_and_refuses_public_ones(server, artifact, tmp_path):
    log_in(tmp_path)
    files = store.contents(artifact)[1]
    hub.push(files, hub.parse("someone/new"), private=True)
    assert server.repos["someone/new"].private
    published(server, artifact)
    with pytest.raises(InputError, match="is public"):
        hub.push(files, hub.parse(NAME), private=True)


def test_push_does_not_bury_other_repositories(server, artifact, tmp_path):
    log_in(tmp_path)
    repo = server.repo(NAME, {"config.json": b"{}", "README.md": b"# A model\n"})
    with pytest.raises(FolderInUse, match=r"holds config.json and no artifact"):
        hub.push(store.contents(artifact)[1], hub.parse(NAME))
    assert repo.commits[repo.branches["main"]]["README.md"] == b"# A model\n"


def test_push_needs_a_token(server, artifact):
    with pytest.raises(InputError, match=r"does not let you write.*hf auth login"):
        hub.push(store.contents(artifact)[1], hub.parse(NAME))
    assert NAME not in server.repos


def test_a_link_among_the_exports_does_not_travel(artifact, tmp_path):
    (tmp_path / "private").write_text("mine")
    (artifact / "exports").mkdir()
    (artifact / "exports" / "cache_config.json").symlink_to(tmp_path / "private")
    with pytest.raises(CorruptFile, match="symbolic link"):
        store.contents(artifact)


# The commands, in a process of their own, by the environment alone


def command(server, tmp_path, *arguments):
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1", "COLUMNS": "200", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "kvcalib", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_commands(server, artifact, tmp_path):
    done = command(server, tmp_path, "push", artifact, NAME, "--message", "By hand", "--license", "mit")
    assert done.returncode == 0, done.stderr
    commit = server.repos[NAME].branches["main"]
    assert f"{NAME} at commit {commit}" in done.stdout
    assert "license: mit" in server.repos[NAME].commits[commit]["README.md"].decode()
    assert (artifact / "README.md").read_text() == "# Card 0\n"
    done = command(server, tmp_path, "pull", f"{NAME}@main", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert commit in done.stdout
    assert contents(tmp_path / "out")["tensors.safetensors"] == contents(artifact)["tensors.safetensors"]
