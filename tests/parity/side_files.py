"""JSON files that repeat the case list of a safetensors file of the same stem."""

from __future__ import annotations

from tests.parity.golden import Check, Golden, exact


def replay_case_list(golden: Golden) -> list[Check] | None:
    """Returns one check: the JSON says what the metadata beside it says."""
    twin = golden.path.with_suffix(".safetensors")
    if golden.kind != "json" or not twin.exists():
        return None
    meta = Golden(twin, golden.roots).meta
    said = meta.get("cases", meta.get("config"))
    return [Check(f"{golden.path.stem}:json repeats metadata", exact(golden.json, said), 0.0)]


REPLAYS = (replay_case_list,)
