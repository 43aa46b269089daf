"""From a raw video to a pose video and to a SCAIL video, with networks of known answers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.pose_films import BODY, contract_models, dance, draw, film
from xicon_infer.errors import PoseError, WeightsError
from xicon_infer.job import make_job
from xicon_infer.media.video import probe, read_clip
from xicon_infer.pose.track import load_tracks
from xicon_infer.service import run_job
from xicon_infer.types import SilentProgress

SIZE = (448, 256)
FRAMES = 9


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return contract_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XICON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pose"


@pytest.fixture(scope="module")
def driving(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("film") / "dance.mkv"
    return film(path, [dance(FRAMES)], size=SIZE)


def job(folder: Path, models: Path, **values):
    given = {
        "pipeline": "pose",
        "output": folder / "out.mp4",
        "models_dir": models,
        "width": 256,
        "height": 448,
    }
    return make_job({k: str(v) if isinstance(v, Path) else v for k, v in (given | values).items()})


def body_error(track, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Returns the largest distance of a body point from the truth, as a share of the height."""
    height, width = size
    found = track.pose.keypoints[:, list(BODY)] / (track.pose.size[1], track.pose.size[0])
    distance = np.linalg.norm((found - truth[:, list(BODY)]) * (width, height), axis=2)
    return float(distance.max() / height)


def test_a_film_becomes_a_pose_video_track_and_json(tmp_path, models, driving):
    progress = SilentProgress()
    result = run_job(job(tmp_path, models, video=driving, overlay=True, sheet=True), progress)
    info = probe(result.path)
    assert (info.width, info.height, info.num_frames, info.fps) == (256, 448, FRAMES, Fraction(24))
    assert read_clip(result.path).frames.max() > 200, "a figure is drawn"
    track = load_tracks(result.outputs["track"])[0]
    assert body_error(track, dance(FRAMES), SIZE) < 0.01
    people = json.loads(result.outputs["openpose"].read_text())
    assert len(people) == FRAMES
    assert len(people[0]["people"][0]["pose_keypoints_2d"]) == 18 * 3
    assert probe(result.outputs["overlay"]).num_frames == FRAMES
    assert result.outputs["sheet"].exists()
    assert result.pose["subjects"][0]["frames"] == FRAMES
    assert any("non-commercial" in warning for warning in progress.warnings)


@pytest.mark.parametrize(
    ("size", "fps"),
    [((256, 448), 30), ((640, 360), 24), ((360, 640), 120), ((720, 406), 16)],
    ids=str,
)
def test_the_truth_is_found_at_every_size_and_rate(tmp_path, models, size, fps):
    path = film(tmp_path / "f.mkv", [dance(6, fps)], size=size, fps=fps)
    result = run_job(job(tmp_path, models, video=path), SilentProgress())
    track = load_tracks(result.outputs["track"])[0]
    assert track.fps == fps
    assert len(track.pose.keypoints) == 6
    assert body_error(track, dance(6, fps), size) < 0.012


def test_bodies_project_onto_the_points(tmp_path, models, driving):
    result = run_job(job(tmp_path, models, video=driving), SilentProgress())
    track = load_tracks(result.outputs["track"])[0]
    joints, camera = track.body.joints, track.body.intrinsics
    projected = joints @ camera.T
    projected = projected[..., :2] / projected[..., 2:]
    for smpl, keypoint in ((16, 5), (17, 6), (20, 9), (21, 10), (7, 15), (8, 16)):
        distance = np.linalg.norm(projected[:, smpl] - track.pose.keypoints[:, keypoint], axis=1)
        assert distance.max() < 6, (smpl, keypoint)


def test_what_was_seen_is_kept(tmp_path, models, driving, cache):
    first = run_job(job(tmp_path, models, video=driving), SilentProgress())
    assert len(list(cache.iterdir())) == 1
    names = [stage.name for stage in first.stages]
    assert "load pose models" in names
    again = run_job(
        job(tmp_path, models, video=driving, overwrite=True, smooth=0.5), SilentProgress()
    )
    assert "load pose models" not in [stage.name for stage in again.stages]
    fresh = run_job(
        job(tmp_path, models, video=driving, overwrite=True, pose_cache=False), SilentProgress()
    )
    assert "load pose models" in [stage.name for stage in fresh.stages]
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_cache_entry_is_made_anew(tmp_path, models, driving, cache):
    run_job(job(tmp_path, models, video=driving), SilentProgress())
    entry = next(cache.iterdir())
    entry.write_bytes(entry.read_bytes()[:200])
    run_job(job(tmp_path, models, video=driving, overwrite=True), SilentProgress())
    assert entry.stat().st_size > 1000


def test_a_saved_track_is_drawn_again(tmp_path, models, driving):
    first = run_job(job(tmp_path, models, video=driving), SilentProgress())
    again = run_job(
        job(
            tmp_path,
            tmp_path,
            track=first.outputs["track"],
            output=tmp_path / "again.mp4",
        ),
        SilentProgress(),
    )
    difference = read_clip(first.path).frames.astype(int) - read_clip(again.path).frames
    assert abs(difference).mean() < 0.5


@pytest.mark.parametrize(
    "change",
    [{"smooth": 1.0}, {"draw_hands": False}, {"keypoint_decode": "udp"}, {"pose_fit": "pad"}],
    ids=str,
)
def test_options_change_the_track_or_the_picture(tmp_path, models, driving, change):
    wide = {"width": 448, "height": 448}
    base = run_job(job(tmp_path, models, video=driving, **wide), SilentProgress())
    other = run_job(
        job(tmp_path, models, video=driving, output=tmp_path / "b.mp4", **wide, **change),
        SilentProgress(),
    )
    tracks = [load_tracks(r.outputs["track"])[0] for r in (base, other)]
    same_track = all(
        np.array_equal(getattr(tracks[0].pose, n), getattr(tracks[1].pose, n))
        for n in ("keypoints", "scores")
    )
    same_picture = np.array_equal(read_clip(base.path).frames, read_clip(other.path).frames)
    if change == {"draw_hands": False}:  # the film shows no hands
        assert same_track
    else:
        assert not (same_track and same_picture)


def two(frames: int) -> list[np.ndarray]:
    """Returns two dancers side by side, the second smaller."""
    one = dance(frames)
    centre = one.mean(axis=(0, 1))
    return [
        (one - centre) * (0.5, 0.8) + (0.3, 0.5),
        (one[::-1] - centre) * (0.4, 0.6) + (0.75, 0.5),
    ]


def test_the_subject_is_chosen(tmp_path, models):
    people = two(6)
    path = film(tmp_path / "two.mkv", people, size=(480, 640))
    for subject, index in (("auto", 0), ("largest", 0), ("0", 0), ("1", 1)):
        result = run_job(
            job(tmp_path, models, video=path, subject=subject, overwrite=True), SilentProgress()
        )
        track = load_tracks(result.outputs["track"])[0]
        assert body_error(track, people[index], (480, 640)) < 0.02, subject
        assert len(result.pose["people"]) == 2
    both = run_job(job(tmp_path, models, video=path, persons=2, overwrite=True), SilentProgress())
    assert len(load_tracks(both.outputs["track"])) == 2
    with pytest.raises(PoseError, match="2 persons"):
        run_job(job(tmp_path, models, video=path, subject="5", overwrite=True), SilentProgress())


def test_nobody_at_all_is_an_error_with_a_remedy(tmp_path, models):
    path = film(tmp_path / "n.mkv", [dance(4)], size=SIZE, present=[np.zeros(4, bool)])
    with pytest.raises(PoseError, match=r"no person was found in any of the 4 frames.*--track"):
        run_job(job(tmp_path, models, video=path), SilentProgress())
    assert not (tmp_path / "out.mp4").exists()


def test_leaving_and_returning(tmp_path, models):
    there = np.ones(40, bool)
    there[6:10] = False  # 0.17 s: closed
    there[20:36] = False  # 0.67 s: nothing is drawn
    path = film(tmp_path / "gap.mkv", [dance(40)], size=SIZE, present=[there])
    result = run_job(job(tmp_path, models, video=path), SilentProgress())
    gaps = result.pose["subjects"][0]["gaps"]
    assert [(g["start"], g["length"], g["filled"]) for g in gaps] == [(6, 4, True), (20, 16, False)]
    drawn = read_clip(result.path).frames.reshape(40, -1).max(axis=1) > 60
    assert drawn[:20].all()
    assert not drawn[21:35].any()
    assert drawn[36:].all()


def test_one_frame(tmp_path, models):
    path = film(tmp_path / "one.mkv", [dance(1)], size=SIZE)
    result = run_job(job(tmp_path, models, video=path), SilentProgress())
    assert result.num_frames == 1


def test_missing_networks_are_named(tmp_path, driving):
    with pytest.raises(WeightsError) as caught:
        run_job(job(tmp_path, tmp_path, video=driving), SilentProgress())
    text = str(caught.value)
    for word in ("yolov10m.onnx", "vitpose_h_wholebody_model.onnx", "nlf_l_multi", "--models-dir"):
        assert word in text


def reference(folder: Path, scale: float = 1.0) -> Path:
    points = dance(1)[0]
    centre = points.mean(axis=0)
    picture = draw(SIZE, [((points - centre) * scale + centre) * (SIZE[1], SIZE[0])])
    path = folder / f"reference{scale}.png"
    cv2.imwrite(str(path), picture[..., ::-1])
    return path


def test_a_reference_like_the_driver_changes_nothing(tmp_path, models, driving):
    same = run_job(
        job(tmp_path, models, video=driving, image=reference(tmp_path)), SilentProgress()
    )
    found = same.pose["alignment"]
    assert found["mode"] in ("central", "down")
    assert abs(found["m"] - 1) < 0.02
    assert abs(found["s"] - 1) < 0.02


def test_a_smaller_reference_draws_a_smaller_figure(tmp_path, models, driving):
    heights = {}
    for name, image, align in (
        ("same", None, None),
        ("small", reference(tmp_path, 0.8), "auto"),
        ("off", reference(tmp_path, 0.8), "off"),
    ):
        values = {"image": image, "align": align, "output": tmp_path / f"{name}.mp4"}
        result = run_job(job(tmp_path, models, video=driving, **values), SilentProgress())
        rows = np.flatnonzero(read_clip(result.path).frames[0].max(axis=(1, 2)) > 60)
        heights[name] = rows.max() - rows.min()
    assert abs(heights["off"] - heights["same"]) <= 2
    assert 0.7 < heights["small"] / heights["same"] < 0.9


def test_a_raw_film_becomes_a_scail_video_in_one_command(tmp_path, models, driving):
    result = run_job(
        job(
            tmp_path,
            models,
            pipeline="scail",
            preset="tiny",
            image=reference(tmp_path),
            video=driving,
            width=128,
            height=224,
            num_inference_steps=1,
            seed=3,
            save_track=True,
            overlay=True,
        ),
        SilentProgress(),
    )
    info = probe(result.path)
    assert (info.width, info.height, info.num_frames) == (128, 224, FRAMES)
    assert result.pose["alignment"]["mode"] != "skipped"
    assert {"track", "overlay", "report"} <= set(result.outputs)
    report = json.loads(result.outputs["report"].read_text())
    assert report["pose"]["reason"]
