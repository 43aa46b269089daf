"""Writing videos, pictures and JSON."""

from __future__ import annotations

import errno
import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.media.samples import loud_from, numbers, ramp, tone
from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import atomic_path, write_json, write_png, write_video
from xicon_infer.types import Audio

RATES = [Fraction(16), Fraction(24), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25, 2)]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    num_frames=st.integers(1, 20),
    height=st.integers(16, 50),
    width=st.integers(16, 50),
    fps=st.sampled_from(RATES),
    audio=st.one_of(
        st.none(),
        st.builds(
            tone,
            st.floats(0.01, 1.5),
            rate=st.sampled_from([16000, 44100]),
            channels=st.sampled_from([1, 2]),
        ),
    ),
)
def test_what_is_written_is_read_back(tmp_path_factory, num_frames, height, width, fps, audio):
    path = tmp_path_factory.mktemp("write") / "a.mp4"
    frames = ramp(num_frames, height, width)
    assert write_video(path, frames, fps=fps, audio=audio) == num_frames
    info, clip = probe(path), read_clip(path)
    assert (info.num_frames, info.fps, info.variable_frame_rate) == (num_frames, fps, False)
    assert clip.frames.shape == (num_frames, height + height % 2, width + width % 2, 3)
    assert numbers(clip.frames) == list(range(num_frames))
    assert (clip.audio is None) == (audio is None)
    if audio is not None:
        assert clip.audio.sample_rate == audio.sample_rate
        assert len(clip.audio.samples) == len(audio.samples)
        seconds = clip.audio.samples.shape[1] / audio.sample_rate
        assert seconds == pytest.approx(float(num_frames / fps), abs=1100 / audio.sample_rate)
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_the_file_is_tagged_and_its_index_comes_first(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, ramp(4), fps=Fraction(24), metadata={"software": "xicon-infer 1.0"})
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_range, codec.colorspace) == (1, 1)
        assert (codec.color_primaries, codec.color_trc) == (1, 1)
        assert container.metadata["software"] == "xicon-infer 1.0"


def test_colours_survive(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[0], frames[1], frames[2] = (200, 30, 40), (10, 220, 90), (20, 60, 230)
    write_video(tmp_path / "a.mp4", frames, fps=Fraction(24), crf=4)
    read = read_clip(tmp_path / "a.mp4").frames
    assert np.abs(read.astype(int) - frames).max() <= 4


def test_odd_sizes_repeat_the_edge(tmp_path):
    frames = np.zeros((1, 17, 19, 3), np.uint8)
    frames[:, :, 18] = 250
    write_video(tmp_path / "a.mp4", frames, fps=Fraction(24), crf=1)
    read = read_clip(tmp_path / "a.mp4").frames[0]
    assert read.shape == (18, 20, 3)
    assert (read[:, 19] > 200).all()
    assert (read[:, :15] < 60).all()


def test_crf_changes_the_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    sizes = []
    for crf in (10, 19, 40):
        write_video(tmp_path / "a.mp4", noise, fps=Fraction(24), crf=crf)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_pictures_and_blocks_come_from_a_generator(tmp_path):
    frames = ramp(9)
    seen = []

    def blocks():
        for block in (frames[0], frames[1:5], frames[5:9]):
            seen.append(len(list(tmp_path.iterdir())))
            yield block

    assert write_video(tmp_path / "a.mp4", blocks(), fps=Fraction(16)) == 9
    assert numbers(read_clip(tmp_path / "a.mp4").frames) == list(range(9))
    assert seen == [1, 1, 1]  # the temporary file is there before the first frame is made


def test_frames_are_encoded_as_they_come(tmp_path):
    sizes = []

    def frames():
        noise = np.random.default_rng(0)
        for _ in range(80):
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield noise.integers(0, 256, (128, 128, 3), dtype=np.uint8)

    write_video(tmp_path / "a.mp4", frames(), fps=Fraction(24), crf=4)
    assert sizes[0] == 0
    assert sizes[-1] > 100_000


def test_short_sound_is_filled_up_or_cuts_the_video(tmp_path):
    sound = tone(0.4, begin_s=0.1)
    options = {"fps": Fraction(20), "audio": sound}
    assert write_video(tmp_path / "a.mp4", ramp(20), **options) == 20
    audio = read_clip(tmp_path / "a.mp4").audio
    assert audio.samples.shape[1] == pytest.approx(16000, abs=1024)
    assert loud_from(audio) == pytest.approx(0.1, abs=0.03)
    assert np.abs(audio.samples[:, 9000:]).max() < 0.01
    assert write_video(tmp_path / "b.mp4", ramp(20), **options, trim_to_audio=True) == 8
    longer = {"fps": Fraction(20), "audio": tone(5.0)}
    assert write_video(tmp_path / "c.mp4", ramp(20), **longer, trim_to_audio=True) == 20


@pytest.mark.parametrize("rate", [12345, 192000])
def test_sound_at_a_rate_that_aac_lacks(tmp_path, rate):
    write_video(tmp_path / "a.mp4", ramp(12), fps=Fraction(24), audio=tone(0.5, rate=rate))
    audio = read_clip(tmp_path / "a.mp4").audio
    assert audio.sample_rate == 48000
    assert audio.samples.shape[1] == pytest.approx(24000, abs=1024)


def test_sound_that_is_no_number_is_silenced(tmp_path):
    samples = np.full((1, 8000), np.nan, np.float32)
    write_video(tmp_path / "a.mp4", ramp(12), fps=Fraction(24), audio=Audio(samples, 16000))
    assert np.abs(read_clip(tmp_path / "a.mp4").audio.samples).max() < 0.01


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled, RuntimeError, MediaError])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_video_leaves_nothing(tmp_path, error, after):
    (tmp_path / "a.mp4").write_text("the old file")

    def frames():
        yield from ramp(after)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_video(tmp_path / "a.mp4", frames(), fps=Fraction(24), audio=tone(1.0))
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "the old file"


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "no frames"),
        (np.zeros((2, 16, 16, 3), np.float32), "uint8"),
        (np.zeros((2, 16, 16, 4), np.uint8), "uint8"),
        (np.zeros((2, 16, 16), np.uint8), "uint8"),
        (np.zeros((1, 0, 16, 3), np.uint8), "uint8"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)], r"\[16, 18, 3\]"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path, frames, words):
    with pytest.raises(MediaError, match=words) as caught:
        write_video(tmp_path / "a.mp4", frames, fps=Fraction(24))
    assert caught.value.code == "MEDIA_WRITE"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [Fraction(0), Fraction(-24)])
def test_rates_that_cannot_be_written(tmp_path, fps):
    with pytest.raises(MediaError, match="frame rate"):
        write_video(tmp_path / "a.mp4", ramp(2), fps=fps)


@pytest.mark.parametrize(
    "audio", [Audio(np.zeros((3, 9), np.float32), 16000), Audio(np.zeros(9, np.float32), 16000)]
)
def test_sound_that_cannot_be_written(tmp_path, audio):
    with pytest.raises(MediaError, match="sound must be"):
        write_video(tmp_path / "a.mp4", ramp(2), fps=Fraction(24), audio=audio)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(MediaError, match="check the folder") as caught:
        write_video(tmp_path / "no" / "a.mp4", ramp(2), fps=Fraction(24), field="target")
    assert (caught.value.code, caught.value.field) == ("MEDIA_WRITE", "target")
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("name", ["a:b.mp4", "100%d.mp4", "日本 語.mp4", "-y.mp4"])
def test_unusual_names(tmp_path, name):
    write_video(tmp_path / name, ramp(2), fps=Fraction(24))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert len(read_clip(tmp_path / name).frames) == 2


def test_a_full_disk_is_named(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(MediaError, match="free some space") as caught,
        atomic_path(tmp_path / "a.bin") as temporary,
    ):
        temporary.write_bytes(b"half")
        raise full
    assert caught.value.code == "DISK_FULL"
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_renames_at_the_end(tmp_path):
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"whole")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".bin"
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"whole"
    with pytest.raises(MediaError, match="folder"), atomic_path(tmp_path):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "b.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_json_and_png(tmp_path):
    write_json(tmp_path / "a.json", {"seed": 7, "text": "ü"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"seed": 7, "text": "ü"}
    picture = ramp(2)[1]
    write_png(tmp_path / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    for value in ({"loss": float("nan")}, {1, 2}):
        with pytest.raises(MediaError) as caught:
            write_json(tmp_path / "b.json", value)
        assert caught.value.code == "MEDIA_WRITE"
    assert not (tmp_path / "b.json").exists()
