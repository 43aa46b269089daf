"""`python -m tests.serving FILE...`: replays files of request cases.

Prints `id ok` or `id FAIL reason` for each case, and a count. Exits with 1 if a case fails, with
2 if there is nothing to replay.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.serving.replay import replay


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    missing = [path for path in arguments if not Path(path).is_file()]
    if not arguments or missing:
        sys.stdout.write(
            f"usage: python -m tests.serving FILE...  (not found: {', '.join(missing) or '-'})\n"
        )
        return 2
    cases = [case for path in arguments for case in read_cases(Path(path))]
    failed = 0
    for case in cases:
        fault = one(case)
        failed += bool(fault)
        sys.stdout.write(f"{case.get('id', '?')} {f'FAIL {fault}' if fault else 'ok'}\n")
    sys.stdout.write(f"{len(cases) - failed} ok  {failed} FAIL\n")
    return 1 if failed else 0 if cases else 2


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Returns the cases of a file: {cases: [...]}, or a list of them."""
    found = json.loads(path.read_text(encoding="utf-8"))
    cases = found["cases"] if isinstance(found, dict) else found
    return list(cases)


def one(case: dict[str, Any]) -> str:
    """Returns why a case fails; one that breaks must not hide the others."""
    try:
        return replay(case)
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
