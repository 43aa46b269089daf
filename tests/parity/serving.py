"""Request cases against the validator; `python -m tests.serving` replays the same files."""

from __future__ import annotations

from tests.parity.golden import Check, Golden, exact
from tests.serving.replay import replay


def replay_cases(golden: Golden) -> list[Check] | None:
    """Returns one check per case: 0 where all that is expected holds."""
    if golden.kind != "json" or not isinstance(golden.json, dict):
        return None
    cases = golden.json.get("cases")
    if not isinstance(cases, list) or not all({"job", "expect"} <= set(case) for case in cases):
        return None
    return [Check(f"{golden.path.stem}:{c['id']}", exact(replay(c), ""), 0.0) for c in cases]


REPLAYS = (replay_cases,)
