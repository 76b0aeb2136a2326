"""Nothing is unpickled or executed: files are data."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("kvcalib", "pipelines") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = re.compile(
    r"pickle|\bdill\b|\bshelve\b|\bmarshal\b"
    r"|(?:import|from)\s+joblib|\bjoblib\."  # its bare name stands in the list of packages with English text
    r"|\btorch\.(?:load|save)\(|(?<![.\w])(?:eval|exec)\("  # model.eval() is another thing
    r"|yaml\.(?:unsafe_|full_)?load\("
)


def offences(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if FORBIDDEN.search(line)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path):
    assert offences(path.read_text()) == []


def test_sources_are_found():
    assert ROOT / "kvcalib/files.py" in SOURCES
    assert len(SOURCES) > 40


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "import cloudpickle as c", "np.load(f, allow_pickle=True)", "from joblib import load",
        "joblib.load(f)", "torch.load(path)", "torch.save(x, path)", "y = eval(text)", "exec(text)", "import marshal",
        "yaml.load(f)",
    ],
)  # fmt: skip
def test_pattern_finds(line):
    assert offences(line) == [line]


@pytest.mark.parametrize(
    "line", ["model.eval()", "retrieval(x)", "huggingface_hub jinja2 joblib jsonschema", "yaml.safe_load(f)"]
)
def test_pattern_leaves_alone(line):
    assert offences(line) == []
