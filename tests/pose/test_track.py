"""Track files: what is saved comes back, and what cannot be trusted is refused by name."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.pose.people import make_track
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.pose import npz
from xicon_infer.pose.track import (
    MAX_FRAMES,
    MAX_PERSONS,
    load_tracks,
    resample_track,
    save_tracks,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "dance_fullbody.npz"


def same(a, b):
    return (
        a.fps == b.fps
        and a.pose.size == b.pose.size
        and all(
            np.array_equal(getattr(x, name), getattr(y, name))
            for x, y, names in (
                (a.pose, b.pose, ("keypoints", "scores", "bboxes")),
                (a.body, b.body, ("joints", "uncertainties", "intrinsics")),
            )
            for name in names
        )
    )


def arrays():
    track = make_track(2)
    return {
        "keypoints": track.pose.keypoints,
        "scores": track.pose.scores,
        "bboxes": track.pose.bboxes,
        "joints": track.body.joints[:, None],
        "intrinsics": track.body.intrinsics,
        "size": np.array(track.pose.size),
        "fps": np.float64(24),
    }


def written(path, **changes):
    content = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
    np.savez_compressed(path, **content)
    return path


def test_example_is_read():
    (track,) = load_tracks(EXAMPLE)
    stored = np.load(EXAMPLE)
    assert track.pose.size == (1280, 720)
    assert track.fps == 24
    assert np.array_equal(track.pose.keypoints, stored["keypoints"])
    assert np.array_equal(track.pose.scores, stored["scores"])
    assert np.array_equal(track.body.joints, stored["joints"][:, 0])
    assert np.array_equal(track.body.intrinsics, stored["intrinsics"])


@pytest.mark.parametrize("persons", [1, 2])
@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(25, 2)])
def test_saved_tracks_come_back(tmp_path, persons, fps):
    tracks = [replace(make_track(3, x=200.0 * p), fps=fps) for p in range(persons)]
    body = replace(tracks[0].body, uncertainties=np.full((3, 24), 7, np.float32))
    tracks[0] = replace(tracks[0], body=body)
    save_tracks(tmp_path / "t.npz", tracks)
    loaded = load_tracks(tmp_path / "t.npz")
    assert len(loaded) == persons
    assert all(same(a, b) for a, b in zip(tracks, loaded, strict=True))


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4"])
def test_other_number_types_and_orders_are_read(tmp_path, kind):
    joints = np.asfortranarray(arrays()["joints"].astype(kind))
    (track,) = load_tracks(written(tmp_path / "t.npz", joints=joints))
    assert track.body.joints.dtype == np.float32
    assert track.body.joints == pytest.approx(joints[:, 0].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keypoints", None, "keypoints is missing"),
        ("keypoints", np.zeros((2, 17, 2)), r"\[2, 17, 2\]; \[2, 1, 133, 2\] is needed"),
        ("keypoints", np.zeros((3, 133, 2)), r"\[3, 133, 2\]; \[2, 1, 133, 2\]"),
        ("scores", np.zeros((2, 133, 1)), r"scores has the shape \[2, 133, 1\]"),
        ("scores", np.full((2, 133), 1.5), "range from 1.5 to 1.5; 0 to 1"),
        ("scores", np.full((2, 133), -0.5), "0 to 1 is needed"),
        ("bboxes", np.zeros((2, 3)), r"bboxes has the shape \[2, 3\]"),
        ("joints", np.zeros((2, 24, 3)), r"joints has the shape \[2, 24, 3\]; \[F, P, 24, 3\]"),
        ("joints", np.zeros((2, 1, 17, 3)), r"\[2, 1, 17, 3\]"),
        ("joints", np.zeros((0, 1, 24, 3)), "at least one frame and one person"),
        ("joints", np.zeros((2, 0, 24, 3)), "at least one frame and one person"),
        ("joints", np.full((2, 1, 24, 3), np.nan), "joints holds 144 values that are not finite"),
        ("keypoints", np.full((2, 133, 2), np.inf), "keypoints holds 532 values"),
        ("keypoints", np.full((2, 133, 2), 2e9), "beyond 1e\\+09"),
        ("uncertainties", np.zeros((2, 24, 1)), r"uncertainties has the shape"),
        ("intrinsics", np.eye(4), r"\[4, 4\]; \[3, 3\]"),
        ("intrinsics", np.zeros((3, 3)), "fx, fy > 0"),
        ("intrinsics", np.ones((3, 3)), "fx, 0, cx"),
        ("size", np.array([10, 20, 3]), r"size has the shape \[3\]; \[2\]"),
        ("size", np.array([10.5, 20]), "whole numbers from 1 to 16384"),
        ("size", np.array([0, 20]), "whole numbers"),
        ("size", np.array([20, 100_000]), "whole numbers"),
        ("fps", np.float64(0), "fps is 0.0; one number from 0.1 to 1000"),
        ("fps", np.array([24.0, 25.0]), "one number"),
        ("fps", np.float64("nan"), "fps holds 1 values"),
        ("joints", np.zeros((1, MAX_PERSONS + 1, 24, 3)), "persons is 9; at most 8"),
        ("joints", np.zeros((MAX_FRAMES + 1, 1, 24, 3), np.uint8), "at most 20000"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, name, value, message):
    path = written(tmp_path / "t.npz", **{name: value})
    with pytest.raises(MediaError, match=message) as caught:
        load_tracks(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value)


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    joints = np.array([Trap()], dtype=object)
    with pytest.raises(MediaError, match="not an array of numbers"):
        load_tracks(written(tmp_path / "t.npz", joints=joints))
    # An array that is not needed is not even read.
    assert load_tracks(written(tmp_path / "u.npz", other=joints))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 broken"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"not a readable \.npz"):
        load_tracks(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(MediaError, match="does not exist"):
        load_tracks(tmp_path / "none.npz")
    with pytest.raises(MediaError, match="not a readable"):
        load_tracks(tmp_path)
    with pytest.raises(MediaError, match="cannot be written"):
        save_tracks(tmp_path / "no" / "such" / "t.npz", [make_track(1)])


def test_damaged_files_give_a_clear_error_or_the_same_track(tmp_path):
    data = bytearray(written(tmp_path / "t.npz").read_bytes())
    random, path = np.random.default_rng(0), tmp_path / "d.npz"
    refused = 0
    for _ in range(150):
        damaged = data.copy()
        for at in random.integers(0, len(data), 3):
            damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_tracks(path)
        except MediaError:
            refused += 1
    for cut in range(1, len(data), len(data) // 30):
        path.write_bytes(data[:-cut])
        with pytest.raises(MediaError):
            load_tracks(path)
    assert refused > 100


def member(shape, data=b"", dtype="<f4"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return header.getvalue() + data


def packed(path, name, content, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for other, value in arrays().items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            archive.writestr(f"{other}.npy", content if other == name else buffer.getvalue())
    return path


@pytest.mark.parametrize("shape", [(10**12, 1, 24, 3), (-1, -144), (2**62, 2**62), (2, 1, 24, 4)])
def test_a_shape_that_the_bytes_do_not_fill_is_refused(tmp_path, shape):
    path = packed(tmp_path / "t.npz", "joints", member(shape, bytes(576)))
    with pytest.raises(MediaError):
        load_tracks(path)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    bomb = packed(tmp_path / "t.npz", "joints", member((50_000,), bytes(200_000)))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(MediaError, match=r"unpacked size in bytes is 20\d+; at most 100000"):
        npz.read_arrays(bomb, {"joints": True}, max_bytes=100_000)
    assert npz.read_arrays(bomb, {"joints": True})["joints"].shape == (50_000,)
    large = tmp_path / "large.npz"
    large.write_bytes(bytes(100_001))
    with pytest.raises(MediaError, match="file size in bytes is 100001"):
        npz.read_arrays(large, {}, max_bytes=100_000)


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path):
    path = packed(tmp_path / "t.npz", "joints", member((2, 1, 24, 3), bytes(5_000_000)))
    data = path.read_bytes()
    true = (5_000_000 + 128).to_bytes(4, "little")
    assert data.count(true) == 2
    path.write_bytes(data.replace(true, (576 + 128).to_bytes(4, "little")))
    with pytest.raises(MediaError):
        load_tracks(path)


def test_packings_without_a_limit_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, arrays()["joints"])
    path = packed(tmp_path / "t.npz", "joints", buffer.getvalue(), zipfile.ZIP_BZIP2)
    with pytest.raises(MediaError, match="unusual way"):
        load_tracks(path)
    assert load_tracks(packed(tmp_path / "u.npz", "joints", buffer.getvalue(), zipfile.ZIP_STORED))


def test_tracks_of_two_videos_are_not_saved_together(tmp_path):
    track = make_track(2)
    others = [
        make_track(3),
        make_track(2, size=(128, 128)),
        make_track(2, fps=25),
        replace(track, body=replace(track.body, intrinsics=track.body.intrinsics * 2)),
        replace(track, body=replace(track.body, joints=track.body.joints[:1])),
    ]
    for other in others:
        with pytest.raises(InvalidRequest, match=r"tracks\[1\] differs"):
            save_tracks(tmp_path / "t.npz", [track, other])
    with pytest.raises(InvalidRequest, match="tracks is empty"):
        save_tracks(tmp_path / "t.npz", [])
    assert not list(tmp_path.iterdir())


def test_resampling_chooses_frames_and_sets_the_rate():
    track = make_track(5)
    chosen = resample_track(track, [0, 3, 3, 1], fps=Fraction(16))
    for name in ("keypoints", "scores", "bboxes"):
        before, after = getattr(track.pose, name), getattr(chosen.pose, name)
        assert np.array_equal(after, before[[0, 3, 3, 1]])
    assert np.array_equal(chosen.body.joints, track.body.joints[[0, 3, 3, 1]])
    assert len(chosen.body.uncertainties) == 4
    assert chosen.fps == 16
    assert resample_track(track, range(5)).fps == track.fps
    assert same(resample_track(track, range(5)), track)


@pytest.mark.parametrize("indices", [[], [5], [-1], [[0]]])
def test_resampling_refuses_frames_that_are_not_there(indices):
    with pytest.raises(InvalidRequest, match="from 0 to 4") as caught:
        resample_track(make_track(5), indices)
    assert caught.value.field == "indices"
