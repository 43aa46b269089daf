"""All Triton kernels, run by Triton's interpreter on the CPU: results against plain PyTorch.

Triton reads its setting when it is imported, so they run in a process of their own; one for all
files, since its start takes as long as the tests of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").glob("*/*_interpreted.py"))


def test_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert len(FILES) == 4
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
