"""Our sampling against the stored results of the reference implementations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import sampling as parity
from tests.parity.golden import Golden

GOLDEN = Path(__file__).parents[1] / "golden"

FILES = {
    parity.replay_tables: (
        "wan_core/scheduler_tables.json",
        "wan_core/scheduler_tables_official.json",
        "wan_core/scheduler_slicing.json",
    ),
    parity.replay_sigma_lists: ("scail/scail_sigmas.json",),
    parity.replay_trajectories: ("wan_core/scheduler_trajectories.safetensors",),
    parity.replay_seeded_noise: ("wan_core/seeded_noise.safetensors",),
    parity.replay_freenoise: ("scail/scail_freenoise.safetensors",),
    parity.replay_pixel_windows: ("wan_core/context_windows.json",),
    parity.replay_latent_windows: ("scail/scail_context_windows.json",),
    parity.replay_cache_constants: ("wan_core/cache_coefficients.json",),
}
CASES = [(replay, name) for replay, names in FILES.items() for name in names]


@pytest.mark.parametrize(("replay", "name"), CASES, ids=lambda value: getattr(value, "stem", None))
def test_golden(replay, name):
    checks = replay(Golden(GOLDEN / name, [GOLDEN]))
    assert checks, "the file was not recognised"
    assert [check for check in checks if not check.ok] == []


def test_golden_windows_of_the_fused_velocity():
    checks = parity.check_windows(Golden(GOLDEN / "scail/scail_context_fuse.safetensors", [GOLDEN]))
    assert [check for check in checks if not check.ok] == []


def test_every_replay_is_exercised():
    assert set(parity.REPLAYS) == set(FILES)


def test_no_replay_takes_the_file_of_another():
    for replay, name in CASES:
        golden = Golden(GOLDEN / name, [GOLDEN])
        assert [other for other in parity.REPLAYS if other(golden) is not None] == [replay]
