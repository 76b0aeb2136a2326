"""Whether a release is reproducible: HEAD built twice, from clones that differ in all that must not matter.

    python tools/release_check.py [--out dist]

The clones differ in path, umask, times of the files, time zone, language and hash seed. The sdist must hold the tracked
files and nothing else, the wheel the tracked files of the package. Prints the hashes to publish beside a release. Needs
`build` and `hatchling` in the interpreter that runs it (`make release-check` sees to that) and no network.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "kvcalib/"
YEAR = 365 * 86400


def build(home: Path, name: str, umask: int, age: int, **environment: str) -> dict[str, bytes]:
    """The files that `python -m build` makes of a fresh clone at `home / name`."""
    source = home / name
    before = os.umask(umask)
    try:
        run("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source))
        for path in source.rglob("*"):
            if not path.is_symlink():
                changed = path.stat().st_mtime - age
                os.utime(path, (changed, changed))
        run(
            sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "made"), str(source),
            **environment,
        )  # fmt: skip
    finally:
        os.umask(before)
    return {path.name: path.read_bytes() for path in sorted((source / "made").iterdir())}


def run(*command: str, **environment: str) -> str:
    """Output of a command; the program ends if it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept | environment)
    if done.returncode:
        sys.exit(f"release-check: {' '.join(command[:4])} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def faults(first: dict[str, bytes], second: dict[str, bytes], home: Path) -> list[str]:
    """What is not as it must be, a line each."""
    found = [f"{name} differs between the builds" for name in first | second if first.get(name) != second.get(name)]
    tracked = set(run("git", "ls-files").splitlines())
    for name, content in first.items():
        (home / name).write_bytes(content)
        if name.endswith(".whl"):
            with zipfile.ZipFile(home / name) as wheel:
                held = {n for n in wheel.namelist() if ".dist-info/" not in n}
            expected = {n for n in tracked if n.startswith(PACKAGE)}
        else:
            with tarfile.open(home / name) as sdist:
                held = {member.name.partition("/")[2] for member in sdist if member.isfile()} - {"PKG-INFO"}
            expected = tracked
        found += [f"{name}: {n} is not tracked" for n in sorted(held - expected)]
        found += [f"{name}: {n} is missing" for n in sorted(expected - held)]
    return found


def main() -> None:
    """Build, compare, print the hashes; exit status 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description="Build HEAD twice and compare; see the file's head.")
    parser.add_argument("--out", type=Path, help="Keep the files there.")
    options = parser.parse_args()
    if run("git", "status", "--porcelain"):
        print("release-check: the working tree has changes; HEAD is what is built", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        first = build(home, "a", 0o022, 0, PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C.UTF-8")
        other = {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
        second = build(home, "another-place/with-a-longer-name", 0o077, YEAR, **other)
        found = faults(first, second, home)
        for line in found:
            print(f"release-check: {line}", file=sys.stderr)
        if found:
            sys.exit(1)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            for name in first:
                shutil.copy(home / name, options.out / name)
    for name, content in first.items():
        print(f"{hashlib.sha256(content).hexdigest()}  {name}")


if __name__ == "__main__":
    main()
