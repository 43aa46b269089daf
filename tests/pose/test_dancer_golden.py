"""SteadyDancer's pose goldens: met, not met when changed, and the robust mode beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.parity import steady_dancer_pose as parity
from tests.parity.golden import Golden
from xicon_infer.pose.dancer_align import MAX_RATIO, MIN_RATIO, apply_alignment, measure
from xicon_infer.pose.dancer_points import first_person, join, person_present, rows
from xicon_infer.pose.keypoints import Figure

FOLDER = Path(__file__).parents[1] / "golden" / "steady_dancer"
CASES = sorted(path.stem for path in FOLDER.glob("pose_*.json"))
FILES = sorted(p.name for p in FOLDER.glob("pose_*") if p.suffix in (".json", ".npz"))


def checks_of(path: Path):
    golden = Golden(path, [path.parent])
    found = [checks for r in parity.REPLAYS if (checks := r(golden)) is not None]
    assert len(found) == 1
    return found[0]


def fitted(case: str, mode: str) -> tuple[Figure, dict]:
    """Returns a case by its own detections, aligned; and what the case says."""
    told = json.loads((FOLDER / f"{case}.json").read_text())
    reference = parity.persons_of(told["input"]["ref"], told["canvas_wh"])
    film = [parity.persons_of(entry, told["vid_size_wh"]) for entry in told["input"]["frames"]]
    driver = join([first_person(persons) for persons in film])
    alignment = measure(
        first_person(reference),
        rows(driver, [0]),
        driving_ratio=told["video_ratio"],
        canvas_ratio=told["ref_ratio"],
        mode=mode,
    )
    told["scales"], told["replaced"] = alignment.scales, alignment.replaced
    return apply_alignment(driver, alignment), told


@pytest.mark.parametrize("name", FILES)
def test_goldens_are_met(name):
    checks = checks_of(FOLDER / name)
    assert len(checks) >= 5
    assert [c for c in checks if not c.ok] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["aligned"][1]["candidate"][4].__setitem__(0, 0.5),
        lambda told: told["aligned"][1]["hands"][1][7].__setitem__(1, 0.5),
        lambda told: told["augmented"][0]["faces"][0][7].__setitem__(1, 0.5),
        lambda told: told["dwpose_frames"][0]["subset"][0].__setitem__(3, -1),
        lambda told: told["align_args"].__setitem__("scale_hand", 1.0),
        lambda told: told["offset"].__setitem__(0, 0.0),
        lambda told: told.__setitem__("aug_seed", 99),
    ],
)
def test_a_changed_case_fails(tmp_path, change):
    told = json.loads((FOLDER / "pose_single.json").read_text())
    change(told)
    (tmp_path / "renamed.json").write_text(json.dumps(told))
    assert any(not check.ok for check in checks_of(tmp_path / "renamed.json"))


@pytest.mark.parametrize("key", ["positive_canvas", "negative_rgb", "with_face_canvas"])
def test_one_changed_pixel_fails(tmp_path, key):
    shutil.copy(FOLDER / "pose_single.json", tmp_path / "a.json")
    shutil.copy(FOLDER / "pose_no_person.json", tmp_path / "b.json")
    with np.load(FOLDER / "pose_single_frames.npz") as file:
        arrays = {name: file[name].copy() for name in file.files}
    np.savez(tmp_path / "renamed.npz", **arrays)
    assert all(check.ok for check in checks_of(tmp_path / "renamed.npz"))
    arrays[key][2, 100, 90] ^= 1
    np.savez(tmp_path / "renamed.npz", **arrays)
    assert [c.name for c in checks_of(tmp_path / "renamed.npz") if not c.ok] == [f"renamed:{key}"]


def test_frames_without_their_case_are_a_skip(tmp_path):
    shutil.copy(FOLDER / "pose_single_frames.npz", tmp_path / "alone.npz")
    assert checks_of(tmp_path / "alone.npz")[0].skip


def test_on_a_clean_film_the_robust_mode_is_the_authors():
    ours, told = fitted("pose_single", "robust")
    assert told["replaced"] == {}
    expected = parity.figure_of(told["aligned"])
    np.testing.assert_allclose(ours.body, expected.body, atol=parity.POINTS)
    np.testing.assert_allclose(ours.hands, expected.hands, atol=parity.POINTS)
    for name, scale in told["align_args"].items():
        assert told["scales"][name.removeprefix("scale_")] == pytest.approx(scale)


@pytest.mark.parametrize("case", CASES)
def test_the_robust_mode_draws_no_bars_across_the_picture(case):
    """Every bone of a person who is there has a length near the reference's."""
    ours, told = fitted(case, "robust")
    assert all(MIN_RATIO <= scale <= MAX_RATIO for scale in told["scales"].values())
    present = person_present(ours)
    wide = np.array([told["ref_ratio"], 1.0])
    reference = np.array(told["ref_body_height_units"])
    driver = np.array([frame["candidate"][:18] for frame in told["dwpose_frames"]])
    driver *= [told["video_ratio"], 1.0]
    for first, last in ((2, 3), (3, 4), (8, 9), (9, 10), (11, 12), (12, 13)):
        bones = np.linalg.norm((ours.body[:, first] - ours.body[:, last]) * wide, axis=1)
        longest = np.linalg.norm(reference[first] - reference[last])
        before = np.linalg.norm(driver[:, first] - driver[:, last], axis=1)
        assert (bones <= 2 * np.maximum(longest, before))[present].all()
    if case == "pose_degenerate_inf":
        official, _ = fitted(case, "official")
        bars = np.linalg.norm((official.body[:, 9] - official.body[:, 10]) * wide, axis=1)
        assert (bars > 0.5).all()
        assert "leg_lower" in told["replaced"]
