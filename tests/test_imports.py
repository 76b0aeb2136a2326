"""Who imports whom, read off the source: the table of docs/architecture.md, "Rooms"."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvcalib"
# Anybody may import them, but for quant, which needs nothing.
LEAVES = {"errors", "files", "folders", "streamed", "tensorfile", "untrusted"}

# room: what it may import of other rooms
ROOMS = {
    "quant": set(),
    "demo": set(),
    "model": {"demo"},
    "calibration": {"model"},
    "allocation": {"quant"},
    "artifact": {"model.identity", "quant"},
    "runtime": {"artifact", "model", "quant"},
    "evaluation": {"runtime", "model", "quant"},
    "refine": {"artifact", "model", "quant"},
    "report": set(),
    "stages": {
        "quant", "demo", "model", "calibration", "allocation", "artifact", "runtime", "evaluation", "refine", "report",
    },
}  # fmt: skip
# file beside the rooms: what it may import
FILES = {
    "errors": set(),
    "files": {"errors", "tensorfile", "untrusted"},
    "folders": {"files"},
    "tensorfile": {"errors", "untrusted"},
    "untrusted": {"errors"},
    "streamed": {"errors", "files", "tensorfile"},
    "launch": {"errors", "files"},
    "rundir": {"model.identity"},
    "recipe": {"stages"},
    "cli": {*ROOMS, "rundir", "recipe", "launch"},
    "__init__": {"runtime.cache", "runtime.loader", "runtime.tiers"},
    "__main__": {"cli"},
}
EXTRA = {"stages": {"rundir", "recipe", "launch", "__init__"}, "cli": {"__init__"}}  # __init__: only its __version__
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Modules of kvcalib that the file imports anywhere, without the leading `kvcalib.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {module(name) for name in names if name.split(".")[0] == "kvcalib"}
    return found


def module(name: str) -> str:
    """The module that `kvcalib.a.b.thing` lies in, as `a.b`; `__init__` for the package itself."""
    parts = name.split(".")[1:]
    while parts and not ((PACKAGE.joinpath(*parts)).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
        parts.pop()
    return ".".join(parts) or "__init__"


def allowed(room: str) -> set[str]:
    base = ROOMS.get(room, FILES.get(room, set())) | EXTRA.get(room, set())
    return base | {room} | (LEAVES if room not in {"quant", "demo", *LEAVES} else set())


def within(target: str, names: set[str]) -> bool:
    return any(target == name or target.startswith(name + ".") for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_only_what_its_room_may(path):
    room = room_of(path)
    assert room in ROOMS or room in FILES, f"{room}: give it a row in this table and in docs/architecture.md"
    wrong = sorted(target for target in imports(path) if not within(target, allowed(room)))
    assert not wrong, f"kvcalib/{path.relative_to(PACKAGE)} imports {wrong}"


def test_rules_in_words():
    """The same, said the other way round, so that the table cannot be loosened by accident."""
    for room in ("quant", "runtime", "model", "artifact", "evaluation", "allocation", "demo", "refine", "report"):
        assert not within("stages", allowed(room))
        assert not within("calibration", allowed(room))
    assert allowed("quant") == {"quant"}
    importers = {
        kind: {room_of(p) for p in SOURCES if any(within(t, {kind}) for t in imports(p))} for kind in ("stages", "cli")
    }
    assert importers["stages"] == {"cli", "stages", "recipe"}
    assert importers["cli"] == {"__main__", "cli"}


def test_imports_are_seen():
    assert "runtime.cache" in imports(PACKAGE / "runtime/loader.py")
    assert "demo" in imports(PACKAGE / "model/text.py")  # inside a function


def test_architecture_page_has_the_same_table():
    page = (ROOT / "docs/architecture.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    told = {room: set(re.findall(r"`([\w.]+)`", cell)) for room, cell in rows.items()}
    assert rows["stages"] == "all of the above"
    told["stages"] = ROOMS["stages"]
    assert told == ROOMS


def test_every_file_is_on_the_architecture_page():
    page = (ROOT / "docs/architecture.md").read_text()
    names = {str(path.relative_to(PACKAGE)) for path in SOURCES if not path.name.startswith("__")}
    assert names == set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE))


def test_pure_maths_needs_no_transformers():
    code = "import kvcalib.quant.packing, sys; print([m for m in ('transformers', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
