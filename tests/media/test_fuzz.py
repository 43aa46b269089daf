"""Damaged and hostile files: always one clear error or a usable result, and no file left over.

Every case is a fixed function of its number, so a failure can be repeated.
"""

from __future__ import annotations

import os
import random
import struct
from fractions import Fraction

import numpy as np
import pytest

from tests.media.samples import make_video, ramp, save_picture, tone
from tests.media.test_image import save_raw_png
from xicon_infer.errors import MediaError
from xicon_infer.media.image import load_image
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import write_video

CODES = {
    "MEDIA_NOT_FOUND",
    "UNSUPPORTED_MEDIA",
    "MEDIA_CORRUPT",
    "MEDIA_TOO_LARGE",
    "VIDEO_TOO_LONG",
}
PICTURES = ("a.jpg", "a.png", "a.webp", "a.bmp", "a.gif")
VIDEOS = ("own.mp4", "sound.mp4", "a.mkv", "a.webm", "a.avi", "a.mov", "video.gif")
DAMAGES = ("cut", "flip", "noise", "blank", "insert", "head")
READERS = (load_image, probe, read_clip)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Returns the content of one whole file of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    frames = ramp(8)
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in PICTURES:
        save_picture(folder / name, picture)
    write_video(folder / "own.mp4", frames, fps=Fraction(24), audio=tone(0.3))
    make_video(folder / "sound.mp4", frames, audio=tone(0.3, channels=2))
    make_video(folder / "a.mkv", frames, audio=tone(0.3))
    make_video(folder / "a.webm", frames, codec="libvpx-vp9", options={"deadline": "realtime"})
    make_video(folder / "a.avi", frames, codec="mpeg4")
    make_video(folder / "a.mov", frames, codec="prores_ks", pix_fmt="yuv422p10le")
    make_video(folder / "video.gif", frames, codec="gif", pix_fmt="rgb8")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reader_of(name):
    return load_image if name in PICTURES else read_clip


def damage(content: bytes, how: str, seed: str) -> bytes:
    chance = random.Random(seed)
    data = bytearray(content)
    place = chance.randrange(len(data))
    if how == "cut":
        del data[place:]
    elif how == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif how == "noise":
        for _ in range(40):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif how == "blank":
        data[place : place + 100] = bytes(len(data[place : place + 100]))
    elif how == "insert":
        data[place:place] = chance.randbytes(30)
    else:
        for _ in range(6):
            data[chance.randrange(min(300, len(data)))] = chance.choice((0, 127, 255))
    return bytes(data)


def check_refusal(error: MediaError, path) -> None:
    assert error.code in CODES
    assert error.field == "given"
    assert error.message.startswith("'given': ")
    for word in ("Traceback", "Errno", "Error(", "av.", "PIL", str(path.parent)):
        assert word not in error.message
    assert len(error.message) < 400


def read_or_refuse(reader, path):
    """Returns the result or the error; any other exception fails the test."""
    before = sorted(path.parent.iterdir())
    try:
        result = reader(path, field="given")
    except MediaError as error:
        check_refusal(error, path)
        result = error
    assert sorted(path.parent.iterdir()) == before
    return result


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*PICTURES, *VIDEOS])
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(tmp_path, originals, name, how, seed):
    path = tmp_path / name
    path.write_bytes(damage(originals[name], how, f"{name} {how} {seed}"))
    result = read_or_refuse(reader_of(name), path)
    if reader_of(name) is read_clip and not isinstance(result, MediaError):
        assert result.frames.dtype == np.uint8
        assert result.frames.ndim == 4
        assert len(result.frames) > 0
        assert result.fps > 0


@pytest.mark.parametrize("name", [*PICTURES, *VIDEOS])
def test_cut_at_many_places(tmp_path, originals, name):
    content = originals[name]
    path = tmp_path / name
    for part in range(12):
        path.write_bytes(content[: len(content) * part // 12])
        result = read_or_refuse(reader_of(name), path)
        if part == 0:
            assert result.code == "MEDIA_CORRUPT"
            assert "empty" in result.message


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_random_bytes(tmp_path, reader, size):
    path = tmp_path / "a.bin"
    for seed in range(5):
        path.write_bytes(random.Random(seed).randbytes(size))
        assert isinstance(read_or_refuse(reader, path), MediaError)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"\xef\xbb\xbf#EXTM3U\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>",
        b"<!doctype html><title>Not found</title>",
        b'{"error": "expired"}',
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        b"[playlist]\nFile1=http://127.0.0.1:9/a.mp3\n",
        b"\x7fELF\2\1\1",
    ],
)
def test_text_that_names_other_files(tmp_path, reader, content):
    for name in ("a.mp4", "a.png", "a.m3u8"):
        path = tmp_path / name
        path.write_bytes(content)
        error = read_or_refuse(reader, path)
        assert error.code == "UNSUPPORTED_MEDIA"
        path.unlink()


def test_a_playlist_makes_nobody_call(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        # Hidden behind bytes that keep the text from being at the start.
        for start in (b"", b"\n\n", b"\0\0\0\x08free"):
            path = tmp_path / "a.mp4"
            path.write_bytes(start + f"#EXTM3U\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n".encode())
            assert isinstance(read_or_refuse(read_clip, path), MediaError)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_a_file(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    places = {
        "pipe": "UNSUPPORTED_MEDIA",
        "folder.mp4": "UNSUPPORTED_MEDIA",
        "dangling": "MEDIA_NOT_FOUND",
        "missing.mp4": "MEDIA_NOT_FOUND",
        "n" * 300: "MEDIA_NOT_FOUND",
        "nul\0.mp4": "MEDIA_NOT_FOUND",
        "new\nline": "MEDIA_NOT_FOUND",
        "http:": "MEDIA_NOT_FOUND",
    }
    for name, code in places.items():
        error = read_or_refuse(reader, tmp_path / name)
        assert error.code == code
        assert error.message.isprintable()


def test_names_of_any_bytes(tmp_path, originals):
    for name in (b"\xe9\xe8.mp4", b"concat:a.mp4", b"100%d.mp4", b"a b?c#d.mp4", b"-i.mp4"):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(originals["own.mp4"])
        assert len(read_or_refuse(read_clip, path).frames) == 8
        path.write_bytes(b"<html>")
        read_or_refuse(read_clip, path)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_claim_to_be_huge(tmp_path, originals, name):
    content = bytearray(originals[name])
    side = 65535
    if name == "a.png":
        save_raw_png(tmp_path / name, width=10**6, height=10**6, bits=8, kind=6, rows=b"")
        content = bytearray((tmp_path / name).read_bytes())
    elif name == "a.bmp":
        content[18:26] = struct.pack("<ii", side, side)
    elif name == "a.gif":
        content[6:10] = struct.pack("<HH", side, side)
    elif name == "a.jpg":
        place = content.find(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", side, side)
    else:
        content[26:30] = struct.pack("<HH", 16383, 16383)
    (tmp_path / name).write_bytes(content)
    error = read_or_refuse(load_image, tmp_path / name)
    assert error.code == "MEDIA_TOO_LARGE"


@pytest.mark.parametrize("box", [b"stsz", b"stts", b"stco", b"mdhd", b"mvhd", b"tkhd", b"avc1"])
@pytest.mark.parametrize("reader", [probe, read_clip])
def test_videos_that_claim_to_be_huge(tmp_path, originals, box, reader):
    content = bytearray(originals["own.mp4"])
    place = content.find(box) + 4
    for offset in range(4, 36, 4):
        changed = bytearray(content)
        changed[place + offset : place + offset + 4] = struct.pack(">I", 0x7FFFFFF0)
        (tmp_path / "a.mp4").write_bytes(changed)
        read_or_refuse(reader, tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_few_frames_may_claim_to_last_long(tmp_path, name):
    path = make_video(tmp_path / name, ramp(2), stamps=[0, 200_000])
    assert read_or_refuse(probe, path).code == "VIDEO_TOO_LONG"
    assert read_or_refuse(read_clip, path).code == "VIDEO_TOO_LONG"
    assert probe(path, limits=MediaLimits(max_duration_s=1e9)).num_frames == 2


@pytest.mark.parametrize("suffix", ["ts", "flv", "nut"])
def test_formats_outside_the_list_are_not_opened(tmp_path, suffix):
    path = make_video(tmp_path / f"a.{suffix}", ramp(4))
    error = read_or_refuse(read_clip, path)
    assert error.code == "UNSUPPORTED_MEDIA"
    assert "Allowed: MP4, MOV, MKV, WebM, AVI, GIF" in error.message


def test_sound_alone_is_no_video(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(4000))
    error = read_or_refuse(read_clip, tmp_path / "a.wav")
    assert "sound" in error.message
    sound_only(tmp_path / "a.mp4")
    error = read_or_refuse(read_clip, tmp_path / "a.mp4")
    assert error.code == "UNSUPPORTED_MEDIA"
    assert "no video stream" in error.message


def sound_only(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        block = np.zeros((1, 1024), np.float32)
        for index in range(4):
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_picture_is_no_video_and_the_other_way_round(tmp_path, originals):
    for name in PICTURES[:4]:
        (tmp_path / name).write_bytes(originals[name])
        assert "a video is expected" in read_or_refuse(read_clip, tmp_path / name).message
    for name in VIDEOS[:5]:
        (tmp_path / name).write_bytes(originals[name])
        assert "a picture is expected" in read_or_refuse(load_image, tmp_path / name).message
