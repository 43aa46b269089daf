"""SteadyDancer and Wan from files to files, and several characters with one dance."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.pose_films import contract_models, dance, film
from xicon_infer.errors import InvalidRequest, MediaError, PoseError
from xicon_infer.job import make_job
from xicon_infer.media.image import load_image
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import write_video
from xicon_infer.pose.track import load_tracks
from xicon_infer.service import run_job, run_jobs
from xicon_infer.service_session import Session
from xicon_infer.types import SilentProgress

EXAMPLES = Path(__file__).parents[1] / "examples"
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
    return film(tmp_path_factory.mktemp("film") / "dance.mkv", [dance(FRAMES)], size=SIZE)


@pytest.fixture(scope="module")
def character(tmp_path_factory) -> Path:
    """Returns a picture in which the contract networks find somebody."""
    path = tmp_path_factory.mktemp("ref") / "ref.png"
    clip = read_clip(film(path.with_suffix(".mkv"), [dance(1)], size=SIZE))
    cv2.imwrite(str(path), clip.frames[0][..., ::-1])
    return path


def job(folder: Path, **values):
    given = {
        "preset": "tiny",
        "output": folder / "out.mp4",
        "width": 128,
        "height": 224,
        "num_inference_steps": 1,
        "seed": 7,
    }
    return make_job({k: str(v) if isinstance(v, Path) else v for k, v in (given | values).items()})


def dancing(folder: Path, models: Path, image: Path, **values):
    given = {"pipeline": "steady_dancer", "models_dir": models, "image": image, "fps": 24}
    return job(folder, **(given | values))


def test_a_film_and_a_picture_become_a_dance(tmp_path, models, character, driving):
    progress = SilentProgress()
    made = dancing(tmp_path, models, character, video=driving, sheet=True, pose_preview=True)
    result = run_job(made, progress)
    info = probe(result.path)
    assert (info.width, info.height, info.num_frames, info.fps) == (128, 224, 9, Fraction(24))
    assert set(result.outputs) == {"report", "sheet", "pose"}
    drawing = result.pose["drawing"]
    assert drawing["frames"] == 9
    assert drawing["driving_fps"] == "24"
    assert drawing["alignment"], "the motion was fitted to the reference"
    assert result.pose["subjects"][0]["frames"] == FRAMES
    names = [stage.name for stage in result.stages]
    assert "find the character" in names
    assert not any("NLF" in warning for warning in progress.warnings), "no body network is loaded"
    preview = read_clip(result.outputs["pose"]).frames
    assert preview.max() > 120
    assert preview[:, 0].max() < 40, "the figure stands on black"


def test_the_driver_as_reference_keeps_its_pose(tmp_path, models, character, driving):
    """The reference is the driver's first frame: nothing is to be fitted."""
    fitted = run_job(
        dancing(tmp_path, models, character, video=driving, pose_preview=True), SilentProgress()
    )
    plain = run_job(
        dancing(
            tmp_path,
            models,
            character,
            video=driving,
            pose_preview=True,
            pose_align="off",
            output=tmp_path / "plain.mp4",
        ),
        SilentProgress(),
    )
    a, b = (read_clip(r.outputs["pose"]).frames.astype(int) for r in (fitted, plain))
    assert (np.abs(a - b).max(axis=3) > 60).mean() < 0.01


def test_the_rate_of_the_dance_is_changed_and_told(tmp_path, models, character, driving):
    result = run_job(dancing(tmp_path, models, character, video=driving, fps=12), SilentProgress())
    assert probe(result.path).fps == 12
    assert result.num_frames == 5
    assert result.pose["drawing"]["driving_fps"] == "24"
    assert result.pose["drawing"]["fps"] == "12"


def test_a_saved_motion_drives_without_networks(tmp_path, models, character, driving):
    first = run_job(
        dancing(tmp_path, models, character, video=driving, save_track=True), SilentProgress()
    )
    track = first.outputs["track"]
    assert not load_tracks(track)[0].body.joints.any(), "there is no body in three dimensions"
    again = run_job(
        dancing(tmp_path, models, character, track=track, output=tmp_path / "b.mp4"),
        SilentProgress(),
    )
    assert again.num_frames == 9
    assert "load pose models" not in [stage.name for stage in again.stages]
    assert again.pose["drawing"]["alignment"] == {}
    values = {"track": track, "output": tmp_path / "c.mp4", "pose_align": "auto"}
    fitted = run_job(dancing(tmp_path, models, character, **values), SilentProgress())
    assert fitted.pose["drawing"]["alignment"], "fitted to the reference on request"


@pytest.mark.parametrize(
    "change",
    [
        {"pose_style": "comfyui"},
        {"draw_hands": False},
        {"draw_face": True},
        {"pose_fit": "pad", "pose_align": "off"},
        {"smooth": 1.0},
    ],
    ids=str,
)
def test_options_of_the_drawing_count(tmp_path, models, driving, change):
    track = EXAMPLES / "dance_fullbody.npz"
    driver = {"track": track} if "pose_align" not in change and "smooth" not in change else {}
    picture = tmp_path / "ref.png"
    cv2.imwrite(str(picture), read_clip(driving).frames[0][..., ::-1])
    # Smoothing needs neighbours; all else shows in one picture.
    count = 5 if "smooth" in change else 1
    base = {"video": driving, "max_frames": count, "pose_preview": True} | driver
    made = [
        run_job(
            dancing(tmp_path, models, picture, **base, **more, output=tmp_path / f"{n}.mp4"),
            SilentProgress(),
        )
        for n, more in enumerate(({}, change))
    ]
    a, b = (read_clip(result.outputs["pose"]).frames for result in made)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    ("value", "mode", "fitted"),
    [("auto", "robust", True), ("official", "official", True), ("off", "robust", False)],
)
def test_how_the_motion_is_fitted(tmp_path, models, driving, value, mode, fitted):
    """A reference in another place moves the figure there, unless that is switched off."""
    picture = tmp_path / "ref.png"
    moved = film(tmp_path / "ref.mkv", [dance(1) * 0.8 + 0.02], size=SIZE)
    cv2.imwrite(str(picture), read_clip(moved).frames[0][..., ::-1])
    result = run_job(
        dancing(
            tmp_path,
            models,
            picture,
            video=driving,
            pose_align=value,
            max_frames=1,
            pose_preview=True,
        ),
        SilentProgress(),
    )
    drawing = result.pose["drawing"]
    assert drawing["options"]["mode"] == mode
    assert bool(drawing["alignment"]) == fitted
    lit = np.argwhere(read_clip(result.outputs["pose"]).frames[0].max(axis=2) > 60)
    top = lit[:, 0].min() / 224
    expected = dance(1)[0, :17, 1].min() * (0.8 if fitted else 1) + (0.02 if fitted else 0)
    assert abs(top - expected) < 0.06


def test_given_poses_as_videos_and_as_folders(tmp_path, character):
    frames = np.random.default_rng(0).integers(0, 255, (6, 56, 32, 3), np.uint8)
    video = tmp_path / "pose.mp4"
    write_video(video, frames, fps=Fraction(16))
    for name in ("positive", "negative"):
        (tmp_path / name).mkdir()
        for index, frame in enumerate(frames if name == "positive" else frames[::-1]):
            cv2.imwrite(str(tmp_path / name / f"{index:04d}.png"), frame)
    base = {"pipeline": "steady_dancer", "image": character, "fps": 16, "guidance_scale": 2.0}
    from_video = run_job(job(tmp_path, **base, pose_video=video), SilentProgress())
    assert from_video.num_frames == 5
    folders = {"pose_video": tmp_path / "positive", "negative_pose": tmp_path / "negative"}
    steps = {"num_inference_steps": 4, "output": tmp_path / "b.mp4"}
    plain = run_job(job(tmp_path, **base, **folders, **steps), SilentProgress())
    guided = run_job(
        job(tmp_path, **base, **folders, **steps, overwrite=True, condition_guide_scale=3.0),
        SilentProgress(),
    )
    assert plain.num_frames == guided.num_frames == 5
    later = run_job(
        job(tmp_path, **base, **folders, skip_frames=5, output=tmp_path / "c.mp4"),
        SilentProgress(),
    )
    assert later.num_frames == 1
    with pytest.raises(InvalidRequest, match="leaves nothing of 6 pictures"):
        run_job(
            job(tmp_path, **base, **folders, skip_frames=6, output=tmp_path / "d.mp4"),
            SilentProgress(),
        )
    (tmp_path / "positive" / "0003.png").unlink()
    with pytest.raises(MediaError, match="0003 is missing"):
        run_job(job(tmp_path, **base, **folders, output=tmp_path / "e.mp4"), SilentProgress())


def test_nobody_in_the_reference_is_refused(tmp_path, models, driving):
    grey = tmp_path / "grey.png"
    cv2.imwrite(str(grey), np.full((200, 120, 3), 127, np.uint8))
    with pytest.raises(PoseError, match="nobody was found in the reference"):
        run_job(dancing(tmp_path, models, grey, video=driving), SilentProgress())
    assert not (tmp_path / "out.mp4").exists()


def test_the_size_follows_the_picture_on_request(tmp_path, models, character, driving):
    made = dancing(tmp_path, models, character, video=driving, sizing="area", max_frames=1)
    result = run_job(made, SilentProgress())
    height, width = load_image(character).shape[:2]
    assert abs(result.width / result.height - width / height) < 0.2
    assert result.width * result.height <= 128 * 224


def test_text_becomes_a_video(tmp_path):
    made = job(tmp_path, pipeline="wan_t2v", prompt="a fox", num_frames=7, sheet=True)
    result = run_job(made, SilentProgress())
    info = probe(result.path)
    assert (info.width, info.height, info.num_frames, info.fps) == (128, 224, 5, Fraction(16))
    assert "7 frames lowered to 5: the model makes 4n+1" in result.warnings
    assert result.machine["components"]["transformer"] == "tiny wan_t2v, generated"


def test_a_picture_comes_to_life(tmp_path, character):
    made = job(tmp_path, pipeline="wan_i2v", image=character, num_frames=5, sheet=True)
    result = run_job(made, SilentProgress())
    assert probe(result.path).num_frames == 5
    other = run_job(
        job(
            tmp_path,
            pipeline="wan_i2v",
            image=EXAMPLES / "character.png",
            num_frames=5,
            output=tmp_path / "b.mp4",
        ),
        SilentProgress(),
    )
    assert not np.array_equal(read_clip(result.path).frames, read_clip(other.path).frames)


@pytest.mark.parametrize(
    ("sizing", "size"), [("exact", (832, 480)), ("area", (464, 832)), ("bucket", (480, 832))]
)
def test_sizes_of_a_start_picture(tmp_path, sizing, size, monkeypatch):
    """The recipe is told the size that the rule chooses; nothing is sampled."""
    from xicon_infer import service_wan

    class Chosen(Exception):
        pass

    def stop(job, seed, chosen):
        raise Chosen(chosen)

    monkeypatch.setattr(service_wan, "wan_options", stop)
    picture = tmp_path / "p.png"
    cv2.imwrite(str(picture), np.zeros((90, 50, 3), np.uint8))
    with pytest.raises(Chosen) as caught:
        run_job(
            job(tmp_path, pipeline="wan_i2v", image=picture, sizing=sizing, width=832, height=480),
            SilentProgress(),
        )
    assert caught.value.args[0] == size


def test_several_characters_share_the_dance(tmp_path, models, character, driving):
    """Networks are loaded once, poses found once, the prompt encoded once."""
    jobs = [
        dancing(tmp_path, models, character, video=driving, output=tmp_path / f"{n}.mp4", seed=n)
        for n in range(2)
    ]
    results = run_jobs(jobs, SilentProgress())
    stages = [[stage.name for stage in result.stages] for result in results]
    assert "load models" in stages[0]
    assert "load pose models" in stages[0]
    assert "load models" not in stages[1]
    assert "load pose models" not in stages[1]
    alone = run_job(
        dancing(tmp_path, models, character, video=driving, output=tmp_path / "a.mp4", seed=1),
        SilentProgress(),
    )
    np.testing.assert_array_equal(read_clip(results[1].path).frames, read_clip(alone.path).frames)


def test_a_session_keeps_the_pose_networks(tmp_path, models, character, driving):
    session, loaded = Session(), []
    for number, change in enumerate(({}, {"seed": 3}, {"keypoint_decode": "udp"})):
        made = dancing(
            tmp_path,
            models,
            character,
            video=driving,
            pose_cache=False,
            output=tmp_path / f"{number}.mp4",
            **change,
        )
        result = run_job(made, SilentProgress(), session)
        loaded.append("load pose models" in [stage.name for stage in result.stages])
    assert loaded == [True, False, True]
    assert len(session.pose_models) == 1


def test_a_session_changes_its_pipeline(tmp_path, character):
    session = Session()
    text = job(tmp_path, pipeline="wan_t2v", prompt="a fox", num_frames=1)
    image = job(
        tmp_path, pipeline="wan_i2v", image=character, num_frames=1, output=tmp_path / "b.mp4"
    )
    kinds = []
    for made in (text, image, image):
        result = run_job(make_job(made.settings() | {"overwrite": True}), SilentProgress(), session)
        kinds.append("load models" in [stage.name for stage in result.stages])
    assert kinds == [True, True, False]
    session.close()
