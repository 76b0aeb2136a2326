"""bench/quality.py: what the README's tables say is what the JSON holds."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from kvcalib.evaluation.comparison import Comparison, Interval, Row

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_quality", ROOT / "bench/quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_quality"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_quality"]


def row(name, bits, kld, failed=None):
    nothing = Interval(value=0, low=0, high=0)
    return Row(
        name=name, source="kvcalib" if name.startswith("kvcalib") else "test", settings={}, effective_bits=bits,
        cache_bytes=1, fp16_cache_bytes=8, ppl=1, nll=0, delta_nll=nothing, failed=failed, kld_p99=0,
        kld=Interval(value=kld, low=kld / 2, high=kld * 2), top1_agreement=nothing,
    )  # fmt: skip


@pytest.fixture
def body():
    rows = [
        row("fp16", 16, 0), row("kvcalib-4", 4, 0.004), row("kvcalib-2.5", 2.5, 0.04), row("kivi:bits=3", 4.1, 0.013),
        row("kivi:bits=2", 2.6, 0.1), row("kivi:bits=2:group=64", 2.4, 0.2), row("int:bits=4", 4.7, 0.008),
        row("int:bits=2", 2.5, 0, failed="no"), row("nf", 2.25, 0.3),
    ]  # fmt: skip
    found = Comparison(
        model="demo", dtype="float32", data="builtin", samples=2, seq_len=8, fp16_nll=1, protocol="one pass",
        created="2026-11-23T00:00:00", machine="a machine, more", versions={}, rows=rows,
    )  # fmt: skip
    return {"comparisons": [found.model_dump(mode="json")]}


def test_each_row_stands_in_the_column_that_it_is_nearest_to(bench, body):
    header, *lines = bench.table_of(Comparison.model_validate(body["comparisons"][0]))
    found = {line[0]: line[1:] for line in lines}
    assert header[1:] == ["about 4", "about 3", "about 2.5", "about 2"]
    assert found["**kvcalib**"] == ["0.004 at 4.00", "", "0.04 at 2.50", ""]
    # Of rows that are equally near the better; 4.7 is too far from 4, what failed has no figure.
    assert found["KIVI"] == ["0.013 at 4.10", "", "0.1 at 2.60", "0.2 at 2.40"]
    assert found["integers"] == ["", "", "", ""]
    assert found["NormalFloat"] == ["", "", "0.3 at 2.25", ""]


def test_readme_is_remade_between_its_marks(bench, body, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nafter\n")
    bench.remake(body, readme)
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith(f"{bench.MARKS[1]}\nafter\n")
    assert "old" not in once
    assert "| **kvcalib** | 0.004 at 4.00 |" in once
    picture = (tmp_path / "docs/images/quality-0.svg").read_text()
    assert "kivi" in picture
    assert picture.count("<svg") == picture.count("</svg>") == 1
    bench.remake(body, readme)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="put both where"):
        bench.remake(body, readme)


def test_the_readme_says_what_the_committed_json_holds(bench):
    body = json.loads((ROOT / "bench/results/quality.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert bench.markdown(body) in readme
    for name in re.findall(r"docs/images/(quality-\d\.svg)", readme):
        assert (ROOT / "docs/images" / name).is_file()
