"""Files that are cut off, damaged in part, or unusual: what can be used is used, and told."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.media.samples import loud_from, make_video, numbers, ramp, tone
from xicon_infer.errors import MediaError
from xicon_infer.media.selection import Selection
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import probe, read_clip
from xicon_infer.media.write import write_video


def read_with_warnings(path, **options):
    warnings = []
    return read_clip(path, warn=warnings.append, **options), warnings


def packets(path, kind):
    """Returns position and size in the file of each packet of the first stream of a kind."""
    with av.open(str(path)) as container:
        stream = container.streams.get(**{kind: 0})[0]
        return [(packet.pos, packet.size) for packet in container.demux(stream) if packet.size]


def blur(path, places):
    """Overwrites stretches of a file with noise."""
    content = bytearray(path.read_bytes())
    for position, size in places:
        content[position : position + size] = random.Random(position).randbytes(size)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mkv", "ffv1", {}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "lag-in-frames": "0"}),
        ("a.avi", "ffv1", {}),
    ],
)
def test_a_cut_video_keeps_what_is_left(tmp_path, name, codec, options):
    noise = np.random.default_rng(0).integers(0, 40, (30, 48, 64, 3), dtype=np.uint8)
    frames = ramp(30) + noise
    pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
    path = make_video(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt, options=options)
    if name == "a.mp4":  # the index must come first for a cut to leave it whole
        write_video(path, frames, fps=Fraction(24), crf=10)
    whole = read_clip(path).frames
    assert probe(path).num_frames == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    clip, warnings = read_with_warnings(path)
    count = len(clip.frames)
    assert 5 < count < 28
    # The last frame may be known in part only.
    assert np.array_equal(clip.frames[: count - 4], whole[: count - 4])
    assert "cut off" in warnings[-1]
    assert probe(path).num_frames is None


def test_a_file_without_its_index_cannot_be_read(tmp_path):
    path = make_video(tmp_path / "a.mp4", ramp(10))  # PyAV puts the index last
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MediaError, match="damaged or cut off") as caught:
        read_clip(path)
    assert caught.value.code == "MEDIA_CORRUPT"


def test_lost_pictures_are_counted(tmp_path):
    path = make_video(tmp_path / "a.mov", ramp(10), codec="png", pix_fmt="rgb24")
    blur(path, packets(path, "video")[4:6])
    clip, warnings = read_with_warnings(path)
    # What is near the damage is kept, however many frames are decoded at once.
    assert numbers(clip.frames) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert len(warnings) == 1
    assert "2 pictures could not be read" in warnings[0]


def test_a_video_whose_pictures_are_all_lost_is_refused(tmp_path):
    path = make_video(tmp_path / "a.mov", ramp(5), codec="png", pix_fmt="rgb24")
    blur(path, packets(path, "video"))
    for reader in (probe, read_clip):
        with pytest.raises(MediaError) as caught:
            reader(path)
        assert caught.value.code == "MEDIA_CORRUPT"


def test_lost_sound_becomes_silence_and_the_rest_stays_in_time(tmp_path):
    path = make_video(tmp_path / "a.mp4", ramp(24), audio=tone(1.0))
    whole = read_clip(path).audio.samples
    blur(path, packets(path, "audio")[5:8])
    clip, _ = read_with_warnings(path)
    damaged = clip.audio.samples
    assert len(clip.frames) == 24
    assert damaged.shape[1] == pytest.approx(whole.shape[1], abs=2048)
    # The last third is far from the damage: a shift would show as a large difference.
    assert np.abs(damaged[:, 11000:15000] - whole[:, 11000:15000]).max() < 0.05


def test_sound_with_nothing_in_it_is_left_out(tmp_path):
    path = make_video(tmp_path / "a.mp4", ramp(24), audio=tone(0.2))
    clip, warnings = read_with_warnings(path, selection=Selection(skip_first_frames=20))
    assert clip.audio is None
    assert "nothing to use" in warnings[0]


def test_hdr_and_pixel_shape_are_told(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.codec_context.color_trc = 16  # PQ
        for index in range(2):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip, warnings = read_with_warnings(path)
    assert clip.frames.shape == (2, 48, 64, 3)
    assert any("4/3" in warning for warning in warnings)
    assert any("HDR" in warning for warning in warnings)


def png_video(path, pictures):
    """Writes a MOV of PNG pictures that need not have one size; its header tells the first."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "rgb24"
        for index, pixels in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = index
            packet.is_keyframe = True
            container.mux(packet)
    return path


def test_pictures_that_change_their_size_take_that_of_the_first(tmp_path):
    pictures = [np.full((height, 64, 3), 90, np.uint8) for height in (48, 24, 60)]
    clip = read_clip(png_video(tmp_path / "a.mov", pictures))
    assert clip.frames.shape == (3, 48, 64, 3)
    assert (clip.frames == 90).all()


def test_pictures_that_grow_over_the_limit_are_not_decoded(tmp_path):
    pictures = [np.full((side, side, 3), 90, np.uint8) for side in (48, 400, 48)]
    path = png_video(tmp_path / "a.mov", pictures)
    clip, warnings = read_with_warnings(path, limits=MediaLimits(max_side_px=64))
    assert len(clip.frames) == 2
    assert "1 pictures could not be read" in warnings[0]
    assert len(read_clip(path).frames) == 3


def test_sound_is_placed_against_the_first_picture(tmp_path):
    stamps = [300 + 40 * index for index in range(20)]
    path = make_video(
        tmp_path / "a.mkv", ramp(20), fps=25, stamps=stamps, audio=tone(1.1, begin_s=0.5)
    )
    assert loud_from(read_clip(path).audio) == pytest.approx(0.2, abs=0.03)
    assert not probe(path).variable_frame_rate
