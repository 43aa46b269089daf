"""Reading videos."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from tests.media.samples import corner_names, corners, loud_from, make_video, numbers, ramp, tone
from xicon_infer.errors import MediaError
from xicon_infer.media.container import Turn, picture
from xicon_infer.media.image import Sizing, resize_frames
from xicon_infer.media.selection import Selection, select_frames
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.timing import stated_rate
from xicon_infer.media.video import iter_frames, probe, read_clip
from xicon_infer.media.write import write_video


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "plain.mp4"
    return make_video(path, ramp(30), fps=30, audio=tone(1.0, begin_s=0.5))


def test_probe_tells_what_is_there(plain):
    info = probe(plain)
    assert (info.width, info.height, info.fps, info.num_frames) == (64, 48, 30, 30)
    assert info.duration_s == pytest.approx(1.0)
    assert info.has_audio
    assert not info.variable_frame_rate
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")


def test_every_frame_comes_in_order(plain):
    warnings = []
    clip = read_clip(plain, warn=warnings.append)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (30, 48, 64, 3)
    assert numbers(clip.frames) == list(range(30))
    assert clip.fps == 30
    assert warnings == []


@pytest.mark.parametrize(
    "options",
    [
        {"force_rate": Fraction(24)},
        {"force_rate": Fraction(60)},
        {"frame_load_cap": 7},
        {"skip_first_frames": 5},
        {"select_every_nth": 3},
        {
            "force_rate": Fraction(24),
            "frame_load_cap": 4,
            "skip_first_frames": 2,
            "select_every_nth": 2,
        },
    ],
)
def test_the_selection_decides_which_frames(plain, options):
    clip = read_clip(plain, selection=Selection(**options))
    rate = options.pop("force_rate", None)
    expected = list(select_frames(30.0, 30, force_rate=float(rate or 0), **options))
    assert numbers(clip.frames) == expected
    assert clip.fps == (rate or 30) / options.get("select_every_nth", 1)


def test_each_frame_is_resized_as_a_picture_is(plain):
    whole = read_clip(plain).frames
    size = Sizing(40, 24, "crop", "left", divisible_by=8)
    expected = resize_frames(
        whole, width=40, height=24, fit="crop", position="left", divisible_by=8
    )
    assert np.array_equal(read_clip(plain, size=size).frames, expected)


def test_frames_equal_those_of_opencv(plain):
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(plain))
    read, frame = capture.read()
    assert read
    assert np.array_equal(read_clip(plain).frames[0], frame[:, :, ::-1])


def test_sound_is_cut_with_the_frames(plain):
    whole = read_clip(plain).audio
    assert whole.sample_rate == 16000
    assert whole.samples.dtype == np.float32
    assert whole.samples.shape[0] == 1
    assert whole.samples.shape[1] == pytest.approx(16000, abs=1024)
    assert loud_from(whole) == pytest.approx(0.5, abs=0.03)
    cut = read_clip(plain, selection=Selection(skip_first_frames=6, frame_load_cap=15)).audio
    assert cut.samples.shape[1] == 8000
    assert loud_from(cut) == pytest.approx(0.3, abs=0.03)
    assert np.array_equal(cut.samples, whole.samples[:, 3200:11200])
    assert read_clip(plain, with_audio=False).audio is None


def test_sound_that_begins_late_stays_in_time(tmp_path):
    sound = tone(0.6, channels=2)
    path = make_video(tmp_path / "a.mp4", ramp(24), audio=sound, audio_start_s=0.25)
    audio = read_clip(path).audio
    assert audio.samples.shape[0] == 2
    assert loud_from(audio) == pytest.approx(0.25, abs=0.03)


def test_no_sound_is_fine(tmp_path):
    path = make_video(tmp_path / "a.mp4", ramp(3))
    assert read_clip(path).audio is None
    assert not probe(path).has_audio


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {"fps": Fraction(30000, 1001)}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
        ("a.avi", {"codec": "mpeg4", "options": {"qscale": "1"}}),
        ("h264.avi", {}),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "fps": 25}),
        ("10bit.mp4", {"pix_fmt": "yuv420p10le"}),
        ("12bit.mov", {"codec": "prores_ks", "pix_fmt": "yuv444p10le"}),
        ("odd.mkv", {"codec": "ffv1", "pix_fmt": "bgr0"}),
    ],
)
def test_containers_depths_and_odd_sizes(tmp_path, name, options):
    frames = ramp(10, height=33, width=47) if "odd" in name else ramp(10)
    path = make_video(tmp_path / name, frames, **options)
    warnings = []
    clip = read_clip(path, warn=warnings.append)
    assert clip.frames.shape == frames.shape
    assert numbers(clip.frames) == list(range(10))
    assert clip.fps == options.get("fps", 24)
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "png", "rgba"),
        ("b.mov", "prores_ks", "yuva444p10le"),
        ("c.mkv", "ffv1", "bgra"),
        ("d.webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, name, codec, pix_fmt):
    pixels = np.full((2, 48, 64, 4), 100, np.uint8)
    pixels[..., 3] = 51
    clip = read_clip(make_video(tmp_path / name, pixels, codec=codec, pix_fmt=pix_fmt))
    assert np.abs(clip.frames.astype(int) - 224).max() <= 3


def test_transparent_gif(tmp_path):
    from PIL import Image

    images = []
    for index in range(3):
        image = Image.new("P", (16, 16), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(1, (4 * index, 0, 4 * index + 4, 4))
        images.append(image)
    images[0].save(
        tmp_path / "a.gif",
        save_all=True,
        append_images=images[1:],
        transparency=0,
        duration=100,
        disposal=2,
    )
    clip = read_clip(tmp_path / "a.gif")
    assert clip.frames.shape == (3, 16, 16, 3)
    assert clip.fps == 10
    for index, frame in enumerate(clip.frames):
        assert tuple(frame[12, 12]) == (255, 255, 255)
        assert tuple(frame[1, 4 * index + 1]) == (255, 0, 0)


@pytest.mark.parametrize(
    ("turn", "seen"), [(90, "GBWR"), (180, "BWRG"), (270, "WRGB"), (0, "RGBW")]
)
def test_rotation_is_applied(tmp_path, turn, seen):
    path = make_video(tmp_path / "a.mp4", corners()[None].repeat(2, axis=0), turn=turn)
    clip, info = read_clip(path), probe(path)
    assert corner_names(clip.frames[0]) == seen
    assert clip.frames.shape[1:3] == (info.height, info.width)
    assert (info.width > info.height) == (turn in (0, 180))
    # The size asked for is that of the upright picture.
    assert read_clip(path, size=Sizing(20, 32)).frames.shape == (2, 32, 20, 3)


def test_an_odd_angle_is_told(tmp_path):
    path = make_video(tmp_path / "a.mp4", corners()[None], turn=30)
    warnings = []
    assert corner_names(read_clip(path, warn=warnings.append).frames[0]) == "RGBW"
    assert "odd angle" in warnings[0]


def test_unknown_colour_numbers_are_passed_over():
    rgb = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 100, np.uint8), format="rgb24")
    frame = rgb.reformat(format="yuv420p")
    frame.colorspace = 3  # reserved by ITU-T H.273
    assert np.abs(picture(frame, Turn(), 64, 48).astype(int) - 100).max() <= 3


@pytest.mark.parametrize(
    ("matrix", "limited"), [("ITU709", True), ("ITU709", False), ("ITU601", True)]
)
def test_colour_tags_are_followed(matrix, limited):
    color = np.full((16, 16, 3), (200, 30, 40), np.uint8)
    frame = av.VideoFrame.from_ndarray(color, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=matrix, dst_color_range=1 if limited else 2
    )
    assert np.abs(picture(frame, Turn(), 16, 16).astype(int) - color).max() <= 3


def test_variable_rate_is_placed_by_time(tmp_path):
    # Ten frames 40 ms apart with a pause of half a second: 10 frames over 0.8 s on average.
    stamps = [0, 40, 80, 120, 160, 640, 680, 720, 760, 800]
    path = make_video(tmp_path / "a.mp4", ramp(10), stamps=stamps)
    warnings = []
    clip = read_clip(path, warn=warnings.append)
    assert probe(path).variable_frame_rate
    assert clip.fps == Fraction(9) / Fraction(8, 10)
    times = [float(index / clip.fps) * 1000 for index in range(len(clip.frames))]
    shown = [stamps[number] for number in numbers(clip.frames)]
    # Whatever is shown in a slot was recorded within half a slot of it, or is the pause.
    for time, stamp in zip(times, shown, strict=True):
        assert abs(time - stamp) <= 45 or (stamp == 160 and time < 640)
    assert len(set(shown)) < len(shown)
    assert "variable frame rate" in warnings[0]


def test_small_jitter_is_not_variable(tmp_path):
    stamps = [0, 33, 67, 100, 133, 167, 200, 233, 267, 300]
    path = make_video(tmp_path / "a.mkv", ramp(10), fps=30, stamps=stamps)
    assert not probe(path).variable_frame_rate
    assert numbers(read_clip(path).frames) == list(range(10))


def test_one_frame(tmp_path):
    path = make_video(tmp_path / "a.mp4", ramp(1))
    clip = read_clip(path, selection=Selection(force_rate=Fraction(60)))
    assert clip.frames.shape == (1, 48, 64, 3)


def test_the_first_of_two_streams(tmp_path):
    path = make_video(tmp_path / "a.mkv", ramp(5) + 100, streams=2)
    assert (read_clip(path).frames > 80).all()


def test_steps_are_told_and_may_stop(plain):
    steps = []
    read_clip(plain, step=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, 31))
    assert all(done <= total <= 33 for done, total in steps)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_clip(plain, step=stop)


def test_skipping_everything_is_explained(plain):
    with pytest.raises(MediaError, match="skip fewer") as caught:
        read_clip(plain, selection=Selection(skip_first_frames=99), field="driver")
    assert caught.value.field == "driver"


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (MediaLimits(max_video_bytes=100), "MEDIA_TOO_LARGE"),
        (MediaLimits(max_side_px=63), "MEDIA_TOO_LARGE"),
        (MediaLimits(max_duration_s=0.5), "VIDEO_TOO_LONG"),
        (MediaLimits(max_frames=29), "VIDEO_TOO_LONG"),
        (MediaLimits(max_frames=2), "VIDEO_TOO_LONG"),
        (MediaLimits(max_clip_bytes=29 * 48 * 64 * 3), "VIDEO_TOO_LONG"),
        (MediaLimits(max_seconds=0.0), "VIDEO_TOO_LONG"),
    ],
)
def test_limits_are_kept(plain, limits, code):
    with pytest.raises(MediaError) as caught:
        read_clip(plain, limits=limits)
    assert caught.value.code == code


def test_limits_that_just_suffice(plain):
    exact = MediaLimits(max_side_px=64, max_frames=30, max_clip_bytes=30 * 48 * 64 * 3)
    assert len(read_clip(plain, limits=exact).frames) == 30
    # Only what is decoded counts: a capped selection of a long file is fine.
    few = MediaLimits(max_frames=4)
    assert len(read_clip(plain, limits=few, selection=Selection(frame_load_cap=4)).frames) == 4


@pytest.mark.parametrize(
    ("average", "nominal", "stated"),
    [
        (Fraction(299_697, 10_000), Fraction(30000, 1001), Fraction(30000, 1001)),
        (Fraction(25), Fraction(90000), Fraction(25)),
        (Fraction(25), Fraction(50), Fraction(25)),
        (None, Fraction(24), Fraction(24)),
        (Fraction(10**6), None, None),
    ],
)
def test_the_nominal_rate_is_preferred_if_it_is_near(average, nominal, stated):
    stream = SimpleNamespace(average_rate=average, guessed_rate=nominal)
    assert stated_rate(stream) == stated


def test_frames_one_by_one_are_the_frames_of_the_clip(tmp_path):
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (11, 32, 48, 3), np.uint8)
    write_video(path, frames, fps=Fraction(24))
    chosen = Selection(Fraction(48), frame_load_cap=9, skip_first_frames=2)
    size = Sizing(24, 16, "crop")
    clip = read_clip(path, selection=chosen, size=size)
    single = list(iter_frames(path, selection=chosen, size=size))
    np.testing.assert_array_equal(np.stack(single), clip.frames)
    with pytest.raises(MediaError, match="none is left"):
        list(iter_frames(path, selection=Selection(skip_first_frames=99)))
