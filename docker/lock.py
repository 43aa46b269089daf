"""Writes docker/packages.txt: every package of the image with its version and hash.

Run it after constraints.txt or packages.in changed: `python docker/lock.py`. pip resolves for the
image's Python and platform without installing anything; versions are those of constraints.txt, so
that the image holds what the tests passed with. pip judges environment markers by the Python that
runs this, which must therefore be 3.11 or newer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHON = "3.12"
GLIBC = ("2_28", "2_27", "2_17", "2_5")
OLD_NAMES = ("manylinux2014_x86_64", "manylinux1_x86_64")
# These come with the variants of PyTorch.
OF_VARIANT = ("torch", "torchvision", "onnxruntime-gpu")
HEADER = (
    "# Written by docker/lock.py from packages.in and constraints.txt: CPython 3.12, x86_64,\n"
    "# glibc 2.28 or newer. Installed with --require-hashes --no-deps.\n"
)


def main() -> int:
    """Returns the exit code of pip, or 0 after writing."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(shared_constraints((ROOT / "constraints.txt").read_text()))
        report = Path(folder) / "report.json"
        done = subprocess.run(pip_command(constraints, report, Path(folder)), check=False)
        if done.returncode:
            return done.returncode
        (HERE / "packages.txt").write_text(lock_text(json.loads(report.read_text())))
    return 0


def shared_constraints(text: str) -> str:
    """Returns constraints.txt without the packages whose version the variant of PyTorch sets."""
    kept = [line for line in text.splitlines() if line.split("==")[0].lower() not in OF_VARIANT]
    return "\n".join(kept) + "\n"


def pip_command(constraints: Path, report: Path, folder: Path) -> list[str]:
    """Returns the words of the command that resolves and installs nothing."""
    platforms = [*(f"manylinux_{version}_x86_64" for version in GLIBC), *OLD_NAMES]
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    words += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    words += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")]
    words += [f"--platform={name}" for name in platforms]
    words += [f"--target={folder / 'nothing'}", f"--report={report}"]
    return [*words, "-c", str(constraints), "-r", str(HERE / "packages.in")]


def lock_text(report: dict[str, Any]) -> str:
    """Returns the lines of packages.txt for a report of pip."""
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{normal(name)}=={version} --hash=sha256:{sha256}")
    return HEADER + "\n".join(sorted(lines)) + "\n"


def normal(name: str) -> str:
    """Returns a package name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
