"""The video is encoded while it is decoded; nothing of it is left when a job fails."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_service import job, track  # noqa: F401  a fixture
from xicon_infer.errors import MediaError, WeightsError
from xicon_infer.media.video import probe, read_clip
from xicon_infer.service import run_job
from xicon_infer.service_early import early_video
from xicon_infer.types import Audio, SilentProgress


def frames(number=5):
    return np.random.default_rng(0).integers(0, 255, (number, 32, 48, 3), np.uint8)


@pytest.fixture
def parts():
    return SimpleNamespace(frames_to=None)


def test_frames_become_a_file_that_is_taken_over(tmp_path, parts):
    made = job(tmp_path, pose_video=tmp_path / "pose.mp4", crf=0)
    sound = Audio(np.zeros((1, 16000), np.float32), 16000)
    with early_video(made, parts, Fraction(16), sound) as early:
        assert not early.take(tmp_path / "before.mp4")
        parts.frames_to(iter((frames()[:1], frames()[1:])))
        assert early.done
        assert early.take(tmp_path / "taken.mp4")
        assert not early.take(tmp_path / "again.mp4")
    info = probe(tmp_path / "taken.mp4")
    assert (info.num_frames, info.fps, info.has_audio) == (5, Fraction(16), True)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]
    assert parts.frames_to is None


def test_nothing_is_left_of_what_was_not_taken(tmp_path, parts):
    made = job(tmp_path, pose_video=tmp_path / "pose.mp4")
    with early_video(made, parts, Fraction(16)) as early:
        early.write(iter((frames(),)))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_video_that_failed_is_not_taken(tmp_path, parts):
    made = job(tmp_path, pose_video=tmp_path / "pose.mp4")

    def broken():
        yield frames()[:1]
        raise RuntimeError("decode failed")

    with early_video(made, parts, Fraction(16)) as early:
        with pytest.raises(RuntimeError, match="decode failed"):
            early.write(broken())
        assert not early.take(tmp_path / "taken.mp4")
    assert not list(tmp_path.iterdir())


def test_a_job_encodes_early_and_gives_the_same_video(tmp_path, track, monkeypatch):  # noqa: F811
    written = []

    def late(early, arriving):
        written.extend(part.copy() for part in arriving)

    one = run_job(job(tmp_path, track=track, crf=0), SilentProgress())
    monkeypatch.setattr("xicon_infer.service_early.EarlyVideo.write", late)
    other = run_job(job(tmp_path, track=track, crf=0, output=tmp_path / "b.mp4"), SilentProgress())
    # The second one saw all frames pass, kept none, and was encoded at the end.
    assert sum(map(len, written)) == 5
    clips = [read_clip(result.path).frames for result in (one, other)]
    assert np.array_equal(*clips)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("b.json", "b.mp4", "out.json", "out.mp4"),
    ]


def test_a_full_disk_ends_the_job_and_leaves_nothing(tmp_path, track, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise MediaError("'output': no space left", field="output", code="DISK_FULL")

    monkeypatch.setattr("xicon_infer.service_early.write_video", full)
    with pytest.raises(MediaError, match="no space left") as caught:
        run_job(job(tmp_path, track=track), SilentProgress())
    assert caught.value.code == "DISK_FULL"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"decoder": "tiny"}, {"vae_chunk": 2}, {"cudnn_benchmark": True}]
)
def test_the_options_of_the_decoder(tmp_path, track, change):  # noqa: F811
    plain = run_job(job(tmp_path, track=track, crf=0), SilentProgress())
    name, value = next(iter(change.items()))
    changed = run_job(
        job(tmp_path, track=track, crf=0, output=tmp_path / "b.mp4", **change), SilentProgress()
    )
    before, after = (read_clip(result.path).frames for result in (plain, changed))
    assert before.shape == after.shape
    assert changed.settings[name] == value
    # The other decoder shows other pictures; the others change nothing but the speed.
    assert np.array_equal(before, after) == (name != "decoder")
    assert changed.machine["decoder"] == ("tiny" if name == "decoder" else "vae")


def test_the_small_decoder_has_no_tiles_and_says_so(tmp_path):
    made = job(tmp_path, pose_video=tmp_path / "pose.mp4", decoder="tiny", tile=True)
    assert any("'tile' has no effect with decoder tiny" in warning for warning in made.warnings)


def test_a_missing_small_decoder_is_told_with_a_command(tmp_path):
    from pipelines.loading import find_preview

    with pytest.raises(WeightsError, match=r"taew2_1.pth was not found.*weights pull taew2-1"):
        find_preview((tmp_path,))
    place = tmp_path / "vae_approx"
    place.mkdir()
    (place / "taew2_1.safetensors").write_bytes(b"empty files do not count")
    assert find_preview((tmp_path,)).name == "taew2_1.safetensors"


def test_frames_are_told_in_the_report(tmp_path, parts):
    made = replace(job(tmp_path, pose_video=tmp_path / "pose.mp4"), vae_chunk=3)
    assert made.settings()["vae_chunk"] == 3
