"""pip-audit on a list of pinned packages; says in one line how it ended, and never takes silence for safety.

    python tools/audit.py constraints.txt

Exit status: 0 no known vulnerability, 1 some, 2 the service could not be asked, or not about every package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Audit the file named first; further arguments go to pip-audit."""
    path = Path(sys.argv[1])
    # The pins are complete: nothing needs to be resolved, or installed, to be looked up.
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "-r",
        str(path),
        "--no-deps",
        "--disable-pip",
        "--progress-spinner=off",
    ]
    done = subprocess.run([*command, "--format=json", *sys.argv[2:]], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        print(f"audit: NOT DONE, the vulnerability service cannot be asked: {lines[-1] if lines else 'no output'}")
        return 2
    skipped = [one for one in packages if "skip_reason" in one]
    if len(skipped) == len(packages):
        why = skipped[0]["skip_reason"] if skipped else "no packages"
        print(f"audit: NOT DONE, the vulnerability service answers for none of {len(packages)} packages: {why}")
        return 2
    known = [(one, each) for one in packages for each in one.get("vulns", [])]
    for one, each in known:
        fixed = ", ".join(each.get("fix_versions", [])) or "no version yet"
        print(f"{one['name']} {one['version']}: {each['id']}, fixed in {fixed}")
    print(f"audit: {len(packages) - len(skipped)} packages asked about, {len(known)} known vulnerabilities")
    if skipped:
        print(f"audit: NOT DONE for {', '.join(one['name'] for one in skipped)}: {skipped[0]['skip_reason']}")
    return 1 if known else 2 if skipped or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
