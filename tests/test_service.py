"""A whole job from files to files: what is written, what is kept, what is left after a failure."""

from __future__ import annotations

import json
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from xicon_infer.errors import Cancelled, InvalidRequest, MediaError, OutOfMemory, XiconError
from xicon_infer.job import make_job
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import write_video
from xicon_infer.pose.track import load_tracks, resample_track, save_tracks
from xicon_infer.service import run_job
from xicon_infer.service_inputs import motion_selection, read_motion
from xicon_infer.service_options import scail_options
from xicon_infer.types import Audio, SilentProgress

EXAMPLES = Path(__file__).parents[1] / "examples"
RATE = 16000


@pytest.fixture(scope="module")
def track(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("track") / "motion.npz"
    save_tracks(path, [resample_track(load_tracks(EXAMPLES / "dance_fullbody.npz")[0], range(12))])
    return path


@pytest.fixture(scope="module")
def driving(tmp_path_factory) -> Path:
    """Returns a video of 20 frames at 20 fps with a tone of one second."""
    path = tmp_path_factory.mktemp("driving") / "driving.mp4"
    t = np.arange(RATE) / RATE
    audio = Audio(np.sin(880 * np.pi * t, dtype=np.float32)[None] * 0.5, RATE)
    frames = np.random.default_rng(0).integers(0, 255, (20, 64, 48, 3), np.uint8)
    write_video(path, frames, fps=Fraction(20), audio=audio)
    return path


def job(folder: Path, **values):
    given = {
        "preset": "tiny",
        "image": EXAMPLES / "character.png",
        "output": folder / "out.mp4",
        "width": 128,
        "height": 128,
        "num_inference_steps": 1,
        "max_frames": 5,
        "seed": 7,
    }
    return make_job({k: str(v) if isinstance(v, Path) else v for k, v in (given | values).items()})


def motion_of(made):
    return read_motion(made, motion_selection(made), SilentProgress())


def test_a_job_writes_video_and_report(tmp_path, track):
    result = run_job(job(tmp_path, track=track), SilentProgress())
    info = probe(result.path)
    assert (info.width, info.height, info.num_frames, info.fps) == (128, 128, 5, Fraction(24))
    assert not info.has_audio
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["seed"] == result.seed == report["settings"]["seed"] == 7
    assert report["num_frames"] == 5
    assert report["fps"] == 24.0
    assert report["machine"]["attention"] in ("flash", "math")
    (told,) = report["machine"]["attention_passes"]
    assert told["self"] == told["cross"] == report["machine"]["attention"]
    assert told["chosen"] == "ordered"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    names = [stage["name"] for stage in report["stages"]]
    assert names[:3] == ["read inputs", "load models", "draw pose"]
    assert names[-1] == "write files"
    assert all(stage["peak_memory_bytes"] > 0 for stage in report["stages"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_the_report_rebuilds_the_job(tmp_path, track):
    first = job(tmp_path, track=track, prompt="a robot")
    run_job(first, SilentProgress())
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert make_job(settings) == first


def test_sheet_and_pose_preview_are_written_on_request(tmp_path, track, driving):
    made = run_job(
        job(tmp_path, track=track, video=driving, sheet=True, pose_preview=True), SilentProgress()
    )
    assert set(made.outputs) == {"report", "sheet", "pose"}
    assert probe(made.outputs["pose"]).num_frames == 5
    assert made.outputs["sheet"].stat().st_size > 2000


def test_sound_and_rate_come_from_the_driving_video(tmp_path, track, driving):
    result = run_job(job(tmp_path, track=track, video=driving), SilentProgress())
    clip = read_clip(result.path)
    assert clip.fps == Fraction(20)
    assert clip.audio is not None
    seconds = clip.audio.samples.shape[1] / clip.audio.sample_rate
    assert abs(seconds - 5 / 20) < 0.05
    assert abs(clip.audio.samples).max() > 0.2
    silent = run_job(
        job(tmp_path, track=track, video=driving, audio="none", output=tmp_path / "b.mp4"),
        SilentProgress(),
    )
    assert read_clip(silent.path).audio is None


def test_sound_starts_where_the_frames_start(tmp_path, track, driving):
    _, plain = motion_of(job(tmp_path, track=track, video=driving))
    _, later = motion_of(job(tmp_path, track=track, video=driving, skip_frames=3))
    assert plain is not None
    assert later is not None
    shift = 3 * RATE // 20
    np.testing.assert_allclose(
        later.samples[:, :500], plain.samples[:, shift : shift + 500], atol=1e-4
    )


def test_a_pose_video_brings_its_own_sound_and_rate(tmp_path, driving):
    result = run_job(job(tmp_path, pose_video=driving), SilentProgress())
    clip = read_clip(result.path)
    assert (clip.fps, len(clip.frames)) == (Fraction(20), 5)
    assert clip.audio is not None


@pytest.mark.parametrize(
    ("values", "fps", "frames"),
    [
        ({"fps": 12, "max_frames": 0}, Fraction(12), 6),
        ({"fps": 48, "max_frames": 0}, Fraction(48), 23),
        ({"select_every_nth": 2, "max_frames": 0}, Fraction(12), 6),
        ({"skip_frames": 4, "max_frames": 0}, Fraction(24), 8),
        ({"max_frames": 3}, Fraction(24), 3),
        ({"fps": 23.976, "max_frames": 0}, Fraction(24000, 1001), 11),
    ],
    ids=str,
)
def test_the_motion_is_selected_like_a_video(tmp_path, track, values, fps, frames):
    tracks, _ = motion_of(job(tmp_path, track=track, **values))
    assert isinstance(tracks, list)
    assert len(tracks[0].body.joints) == frames
    assert tracks[0].fps == fps


def test_options_reach_the_recipe(tmp_path, track):
    options = scail_options(
        job(tmp_path, track=track, tile=True, context_overlap=20, fuse_method="pyramid"), 99
    )
    assert options.seed == 99
    assert options.tiles is not None
    assert (options.tiles.height, options.tiles.stride_width) == (34, 16)
    assert (options.context.overlap, options.context.fuse) == (20, "pyramid")
    assert scail_options(job(tmp_path, track=track), 1).tiles is None


def test_a_seed_is_drawn_and_reported(tmp_path, track):
    first, second = (
        run_job(job(tmp_path, track=track, seed=-1, output=tmp_path / f"{i}.mp4"), SilentProgress())
        for i in (1, 2)
    )
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**53
    again = run_job(
        job(tmp_path, track=track, seed=first.seed, output=tmp_path / "3.mp4"), SilentProgress()
    )
    np.testing.assert_array_equal(read_clip(first.path).frames, read_clip(again.path).frames)


class StopAt(SilentProgress):
    """Raises when a stage begins, or at the first sampling step."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = stage, error

    @contextmanager
    def stage(self, name: str):
        if name == self.where:
            raise self.error
        yield

    def step(self, done: int, total: int, unit: str = "step") -> None:
        if unit == self.where:
            raise self.error


@pytest.mark.parametrize("where", ["read inputs", "encode text", "step", "decode video"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), Cancelled("stop")], ids=["ctrl-c", "cancel"]
)
def test_stopping_leaves_nothing(tmp_path, track, where, error):
    with pytest.raises(type(error)):
        run_job(job(tmp_path, track=track), StopAt(where, error))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(tmp_path, track):
    (tmp_path / "out.json").mkdir()  # the report, written last, cannot replace a folder
    with pytest.raises(MediaError):
        run_job(job(tmp_path, track=track, sheet=True, pose_preview=True), SilentProgress())
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_out_of_memory_says_what_to_do(tmp_path, track):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    with pytest.raises(OutOfMemory, match=r"128x128: CUDA out of memory.*--max-frames") as caught:
        run_job(job(tmp_path, track=track), StopAt("sample", error))
    assert caught.value.exit_code == 6


def test_bad_steps_are_refused_before_anything_is_loaded(tmp_path, track):
    stages: list[str] = []

    class Watch(SilentProgress):
        @contextmanager
        def stage(self, name: str):
            stages.append(name)
            yield

    with pytest.raises(InvalidRequest, match="flowmatch_distill"):
        run_job(job(tmp_path, track=track, scheduler="flowmatch_distill"), Watch())
    assert stages == []


def test_warnings_are_told_once_and_kept(tmp_path, track):
    progress = SilentProgress()
    result = run_job(job(tmp_path, track=track, max_frames=7), progress)
    assert result.warnings == progress.warnings
    assert any("7 frames lowered to 5" in warning for warning in result.warnings)


def test_a_motion_with_nothing_left_is_refused(tmp_path, track):
    with pytest.raises(XiconError, match="skip"):
        run_job(job(tmp_path, track=track, skip_frames=100), SilentProgress())


def test_the_video_plays_and_is_tagged(tmp_path, track):
    result = run_job(job(tmp_path, track=track), SilentProgress())
    with av.open(str(result.path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert sum(1 for _ in container.decode(stream)) == 5
    head = result.path.read_bytes()[:4096]
    assert b"moov" in head, "the index must come first, for playing while loading"
