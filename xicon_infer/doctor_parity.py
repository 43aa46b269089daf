"""`doctor --parity`: the replays of the source checkout, told like the self-test.

The reference outputs and the code that replays them are part of the tests, not of the installed
package. Networks run on the device and in the dtype that are asked for; in bfloat16 the errors
allowed are those of bfloat16.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from xicon_infer.doctor_text import Number
from xicon_infer.errors import BackendUnavailable

_LINE = re.compile(r"(.+?)\s+(\S+)\s+(\d\.\d+e[+-]\d+)\s+(ok|FAIL|SKIP)(.*)")


def replay(
    golden: Path | None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    root: Path = Path(__file__).parents[1],
) -> list[Number]:
    """Returns one comparison per reference output.

    Args:
        golden: folder of reference outputs; those of the checkout if None.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16"; "float16" has no class of its own and is told as float32.
        root: of the checkout.

    Raises:
        BackendUnavailable: this is no checkout, or there is nothing to replay.
    """
    folder = golden or root / "tests" / "golden"
    if not (root / "tests" / "parity" / "__main__.py").is_file():
        raise BackendUnavailable(
            "'--parity' needs the source of xicon-infer, whose tests hold the replays; "
            "'--selftest' needs nothing",
            field="parity",
        )
    kind = "bf16" if dtype == "bfloat16" else "fp32"
    options = ["--device", device, "--dtype", kind]
    command = [sys.executable, "-m", "tests.parity", *options, str(folder.absolute())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    numbers = read_lines(done.stdout)
    if not numbers:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BackendUnavailable(
            f"'--golden' {folder}: nothing was replayed: {said[-1] if said else 'no output'}",
            field="golden",
        )
    return numbers


def read_lines(text: str) -> list[Number]:
    """Returns the comparisons that `python -m tests.parity` printed."""
    numbers = []
    for line in text.splitlines():
        if found := _LINE.fullmatch(line.rstrip()):
            name, error, tolerance, verdict, reason = found.groups()
            skip = reason.strip() or "no reason" if verdict == "SKIP" else ""
            numbers.append(Number(name, float(error), float(tolerance), skip))
    return numbers
