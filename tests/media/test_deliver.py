"""The ways a video can take, and what happens when each of them is closed."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.media.s3_server import (
    SECRET,
    Fault,
    config_for,
    contents,
    fetch,
    hide_surroundings,
    new_bucket,
    proxy,
)
from tests.media.samples import loud_from, ramp, tone
from xicon_infer.errors import Cancelled
from xicon_infer.media.deliver import DeliveryError, DeliveryPlan, OutputFile, deliver
from xicon_infer.media.deliver_inline import REENCODE_CRFS, json_bytes, size_warning
from xicon_infer.media.deliver_put import PutFailed
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import write_video

JOB = "0a1b2c3d4e5f-e1"
RATE = Fraction(30000, 1001)
METADATA = {"request_id": JOB, "prompt": "tänzer " * 20}


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    hide_surroundings(monkeypatch)


@pytest.fixture(scope="module")
def video_bytes(tmp_path_factory):
    """Returns a noisy, and so large, video with sound and tags."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 96, 3), dtype=np.uint8)
    frames = noise // 4 + ramp(24, 64, 96) // 2
    write_video(
        path, frames, fps=RATE, audio=tone(0.7, begin_s=0.3), crf=10, metadata={"software": "x 1"}
    )
    return path.read_bytes()


@pytest.fixture
def result(tmp_path, video_bytes):
    folder = tmp_path / "job"
    folder.mkdir()
    path = folder / "result.mp4"
    path.write_bytes(video_bytes)
    return OutputFile("result", path, "video/mp4", 96, 64, RATE, 24, 24 / float(RATE))


@pytest.fixture
def pose(result):
    path = result.path.with_name("pose.mp4")
    write_video(path, ramp(8), fps=Fraction(16))
    return OutputFile("pose", path, "video/mp4", 64, 48, 16.0, 8, 0.5)


def plan_of(**changes):
    values = {
        "bucket": None,
        "volume": None,
        "inline_limit": 9_500_000,
        "job_id": JOB,
        "mode": "scail",
        "seed": 42,
        **changes,
    }
    return DeliveryPlan(**values)


def answer(videos, warnings=(), errors=()):
    """Returns the whole answer as a worker sends it."""
    return {
        "output": {
            "status": "success",
            "videos": videos,
            "warnings": list(warnings),
            "errors": list(errors),
            "metadata": METADATA,
        }
    }


def handed_over(files, plan, **options):
    options.setdefault("sleep", lambda seconds: None)
    return deliver(files, plan, answer_overhead=lambda v: json_bytes(answer(v)), **options)


def whole(delivered):
    return json_bytes(answer(delivered.videos, delivered.warnings, delivered.errors))


def codes(delivered):
    return [said["code"] for said in delivered.warnings]


def test_the_entry_of_a_video_inside_the_answer(result, video_bytes):
    delivered = handed_over([result], plan_of())
    assert delivered.videos == [
        {
            "filename": "xicon_scail_0a1b2c3d_42.mp4",
            "type": "base64",
            "data": base64.b64encode(video_bytes).decode(),
            "format": "video/h264-mp4",
            "role": "result",
            "width": 96,
            "height": 64,
            "fps": 29.97003,
            "frames": 24,
            "duration_s": 0.801,
            "size_bytes": len(video_bytes),
            "sha256": hashlib.sha256(video_bytes).hexdigest(),
        }
    ]
    assert (delivered.warnings, delivered.errors) == ([], [])
    assert list(json.loads(json.dumps(delivered.videos))[0]) == list(delivered.videos[0])


def test_names_are_made_of_safe_characters_only(result, tmp_path):
    plan = plan_of(
        job_id="../../x y/z", filename_prefix="../é a-b", volume=tmp_path / "v", want="volume"
    )
    (video,) = handed_over([result], plan).videos
    assert video["filename"] == "a-b_scail_xyz_42.mp4"
    assert video["data"] == "xyz/a-b_scail_xyz_42.mp4"
    assert (tmp_path / "v" / "xyz" / "a-b_scail_xyz_42.mp4").is_file()
    for job_id in ("..", "", "/"):
        (video,) = handed_over([result], replace(plan, job_id=job_id)).videos
        assert video["data"].startswith("job/")
    (video,) = handed_over([result], replace(plan, job_id="a" * 200)).videos
    assert video["data"].split("/")[0] == "a" * 128


def test_the_result_comes_first_and_the_pose_is_named_so(result, pose):
    videos = handed_over([pose, result], plan_of()).videos
    assert [video["role"] for video in videos] == ["result", "pose"]
    assert videos[1]["filename"] == "xicon_scail_0a1b2c3d_42_pose.mp4"
    assert videos[1]["fps"] == 16


def test_gif_and_webm_keep_their_names(result):
    for mime, suffix in (("image/gif", ".gif"), ("video/webm", ".webm")):
        (video,) = handed_over([replace(result, mime=mime)], plan_of()).videos
        assert (video["format"], video["filename"][-len(suffix) :]) == (mime, suffix)


def test_the_limit_counts_every_byte_of_the_answer(result):
    exact = whole(handed_over([result], plan_of()))
    measured = exact + json_bytes([[], []])  # warnings and errors are counted once more
    plan = plan_of(inline_limit=measured, oversize="fail")
    assert whole(handed_over([result], plan)) == exact
    with pytest.raises(DeliveryError) as caught:
        handed_over([result], replace(plan, inline_limit=measured - 1))
    assert caught.value.code == "OUTPUT_TOO_LARGE"
    assert "configure a bucket" in caught.value.hint


@pytest.mark.parametrize("share", [0.95, 0.6, 0.35, 0.2])
def test_a_video_too_large_is_encoded_again_with_sound_and_tags(result, share):
    limit = int(whole(handed_over([result], plan_of())) * share)
    delivered = handed_over([result], plan_of(inline_limit=limit))
    (video,) = delivered.videos
    assert whole(delivered) <= limit
    assert codes(delivered) == ["OUTPUT_REENCODED"]
    data = base64.b64decode(video["data"])
    assert (len(data), hashlib.sha256(data).hexdigest()) == (video["size_bytes"], video["sha256"])
    path = result.path.with_name("got.mp4")
    path.write_bytes(data)
    info, clip = probe(path), read_clip(path)
    assert (info.num_frames, info.width, info.height, info.fps) == (24, 96, 64, RATE)
    assert loud_from(clip.audio) == pytest.approx(0.3, abs=0.08)
    with av.open(str(path)) as container:
        assert container.metadata["software"] == "x 1"
    assert sorted(p.name for p in result.path.parent.iterdir()) == ["got.mp4", "result.mp4"]


def test_the_best_quality_that_fits_is_taken(result):
    full = whole(handed_over([result], plan_of()))
    told = []
    for share in (0.95, 0.6, 0.35, 0.2):
        delivered = handed_over([result], plan_of(inline_limit=int(full * share)))
        told.append(next(crf for crf in REENCODE_CRFS if f"CRF {crf} " in str(delivered.warnings)))
    assert told == sorted(told)
    assert len(set(told)) > 1


def test_too_large_goes_to_the_volume_before_it_is_made_worse(result, tmp_path, video_bytes):
    root = tmp_path / "volume"
    plan = plan_of(inline_limit=2000, volume=root / "outputs", volume_root=root)
    delivered = handed_over([result], plan)
    (video,) = delivered.videos
    assert (video["type"], codes(delivered)) == ("path", [])
    assert video["data"] == f"outputs/{JOB}/xicon_scail_0a1b2c3d_42.mp4"
    assert (root / video["data"]).read_bytes() == video_bytes
    assert codes(handed_over([result], replace(plan, want="base64"))) == ["INLINE_TOO_LARGE"]
    (video,) = handed_over([result], replace(plan, volume_root=None)).videos
    assert video["data"] == f"{JOB}/xicon_scail_0a1b2c3d_42.mp4"


@pytest.mark.parametrize("mime", ["video/mp4", "image/gif"])
def test_too_large_for_everything_is_an_error_and_the_video_is_kept(result, tmp_path, mime):
    keep = tmp_path / "kept"
    plan = plan_of(inline_limit=2000, keep=keep)
    with pytest.raises(DeliveryError) as caught:
        handed_over([replace(result, mime=mime)], plan)
    error = caught.value
    assert error.code == "OUTPUT_TOO_LARGE"
    (kept,) = keep.glob("*/*")
    assert kept.read_bytes() == result.path.read_bytes()
    assert repr(kept.name) in error.hint
    assert keep.stat().st_mode & 0o077 == 0
    assert str(tmp_path) not in str(error) + error.hint + repr(error)
    for number in range(12):
        with pytest.raises(DeliveryError):
            handed_over([result], replace(plan, job_id=f"job{number}", oversize="fail"))
    assert len(list(keep.glob("*/*"))) == 10


def test_the_order_of_the_ways(result, tmp_path):
    bucket, volume = new_bucket(), tmp_path / "v"
    with proxy() as way:
        full = plan_of(bucket=config_for(way, bucket, prefix="a/b"), volume=volume)
        for want, kind in (
            ("auto", "s3_url"),
            ("s3", "s3_url"),
            ("base64", "base64"),
            ("volume", "path"),
        ):
            delivered = handed_over([result], replace(full, want=want))
            assert (delivered.videos[0]["type"], codes(delivered)) == (kind, [])
    for want, kind, code in (
        ("auto", "base64", []),
        ("s3", "base64", ["S3_UPLOAD_FAILED"]),
        ("volume", "base64", ["VOLUME_FAILED"]),
    ):
        delivered = handed_over([result], plan_of(want=want))
        assert (delivered.videos[0]["type"], codes(delivered)) == (kind, code)
    key = f"a/b/{JOB}/xicon_scail_0a1b2c3d_42.mp4"
    assert contents(bucket) == {key: result.path.read_bytes()}


def test_a_link_into_the_bucket_works_and_expires(result, pose):
    bucket = new_bucket()
    with proxy() as way:
        plan = plan_of(bucket=config_for(way, bucket), url_expires_s=90)
        delivered = handed_over([result, pose], plan)
        for video, file in zip(delivered.videos, (result, pose), strict=True):
            assert fetch(video["data"]) == (200, file.path.read_bytes())
            assert "X-Amz-Expires=90&" in video["data"]
            assert list(video)[-1] == "expires_at"
    assert "Signature" not in repr(delivered) + repr(plan)
    assert SECRET not in repr(plan)


@pytest.mark.parametrize("kind", ["503", "403", "reset", "page"])
def test_a_bucket_that_fails_loses_nothing(result, tmp_path, kind, caplog):
    bucket, waits = new_bucket(), []
    caplog.set_level(logging.DEBUG)
    with proxy(Fault(kind, times=None)) as way:
        plan = plan_of(bucket=config_for(way, bucket))
        inside = handed_over([result], plan, sleep=waits.append)
        small = replace(plan, inline_limit=2000)
        on_volume = handed_over([result], replace(small, volume=tmp_path / "v"))
        with pytest.raises(DeliveryError) as caught:
            handed_over([result], replace(small, keep=tmp_path / "kept"))
    assert (inside.videos[0]["type"], codes(inside)) == ("base64", ["S3_UPLOAD_FAILED"])
    assert waits == [2.0, 6.0]
    assert (on_volume.videos[0]["type"], codes(on_volume)) == ("path", ["S3_UPLOAD_FAILED"])
    assert caught.value.code == "UPLOAD_FAILED"
    assert [said["code"] for said in caught.value.warnings] == ["S3_UPLOAD_FAILED"]
    assert next((tmp_path / "kept").glob("*/*")).read_bytes() == result.path.read_bytes()
    assert contents(bucket) == {}
    told = caplog.text + str(caught.value) + str(inside.warnings)
    for secret in (SECRET, "Signature", "127.0.0.1", str(tmp_path)):
        assert secret not in told


def test_a_pose_video_that_fails_is_only_told(result, pose):
    bucket = new_bucket()
    with proxy(Fault("503", lambda r: "_pose" in r.path, times=None)) as way:
        plan = plan_of(bucket=config_for(way, bucket), inline_limit=1500)
        delivered = handed_over([result, pose], plan)
    assert [video["role"] for video in delivered.videos] == ["result"]
    assert len(delivered.errors) == 1
    assert "pose" in delivered.errors[0]


def test_room_is_left_for_what_comes_after_the_result(result, pose):
    alone = whole(handed_over([result], plan_of()))
    plan = plan_of(inline_limit=alone + 1000, oversize="fail")
    handed_over([result], plan)
    with pytest.raises(DeliveryError):
        handed_over([result, pose], plan)
    roomy = handed_over([result, pose], replace(plan, inline_limit=alone + 5000))
    assert whole(roomy) <= alone + 5000


def put_of(outcomes, seen):
    """Returns a PUT that ends as told, one outcome per call."""

    def put(url, path, *, mime, stop):
        stop()
        seen.append((url, path.read_bytes(), mime))
        if outcome := outcomes.pop(0):
            raise outcome

    return put


def test_the_client_s_own_address_gets_the_result_by_one_put(result, pose, video_bytes):
    seen, url = [], "https://films.example/a.mp4?sig=marked"
    plan = plan_of(upload_url=url)
    delivered = handed_over([result, pose], plan, put=put_of([None], seen))
    assert seen == [(url, video_bytes, "video/mp4")]
    assert [video["type"] for video in delivered.videos] == ["s3_url", "base64"]
    assert delivered.videos[0]["data"] == "https://films.example/a.mp4"
    assert "marked" not in repr(plan)


@pytest.mark.parametrize(
    ("outcomes", "tries", "kind"),
    [
        ([PutFailed("x", again=True), None], 2, "s3_url"),
        ([PutFailed("x", again=True)] * 3, 3, "base64"),
        ([PutFailed("x", again=False)], 1, "base64"),
    ],
)
def test_an_address_that_fails_is_followed_by_the_other_ways(result, outcomes, tries, kind):
    seen, waits, put = [], [], None
    put = put_of(list(outcomes), seen)
    plan = plan_of(upload_url="https://films.example/a.mp4")
    delivered = handed_over([result], plan, put=put, sleep=waits.append)
    assert (len(seen), waits) == (tries, [2.0, 6.0][: tries - 1])
    assert delivered.videos[0]["type"] == kind
    assert codes(delivered) == ([] if kind == "s3_url" else ["S3_UPLOAD_FAILED"])


@pytest.mark.parametrize("asked", [1, 2, 4, 8, 20])
def test_cancelling_leaves_nothing_anywhere(result, pose, tmp_path, asked):
    bucket, calls = new_bucket(), []

    def cancelled():
        calls.append(1)
        return len(calls) > asked

    with proxy(Fault("503", times=None)) as way:
        plan = plan_of(
            bucket=config_for(way, bucket), inline_limit=3000, volume=tmp_path / "v", want="base64"
        )
        for changes in ({"volume": None}, {"volume": None, "want": "auto"}, {}):
            calls.clear()
            try:
                handed_over([result, pose], replace(plan, **changes), cancelled=cancelled)
            except (Cancelled, DeliveryError):
                assert not [p for p in result.path.parent.rglob("*") if p.suffix != ".mp4"]
    assert contents(bucket) == {}
    assert not list((tmp_path / "v").rglob(".*"))
    with pytest.raises(Cancelled):
        handed_over([result], plan, cancelled=lambda: True)


def test_a_size_that_is_likely_too_large_is_told_ahead():
    plan = plan_of()
    assert size_warning(plan, width=512, height=896, frames=81) is None
    said = size_warning(plan, width=1024, height=1024, frames=800)
    assert said["code"] == "LIKELY_TOO_LARGE"
    frames = 9_500_000 * 3 / 4 / (1024 * 1024 * 0.08 / 8)
    assert size_warning(plan, width=1024, height=1024, frames=int(frames)) is None
    assert size_warning(plan, width=1024, height=1024, frames=int(frames) + 1)
    elsewhere = plan_of(upload_url="https://a.example/b")
    assert size_warning(elsewhere, width=1024, height=1024, frames=800) is None
