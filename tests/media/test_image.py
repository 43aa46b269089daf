"""Reading pictures."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.media.samples import corner_names, corners, save_picture
from xicon_infer.errors import MediaError
from xicon_infer.media.image import load_image
from xicon_infer.media.source import MediaLimits

PICTURE = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
ORIENTATION = 0x0112


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save_picture(tmp_path / f"a.{suffix}", PICTURE, **options)
    assert np.array_equal(load_image(path), PICTURE)
    assert np.array_equal(load_image(str(path)), PICTURE)


def test_the_name_says_nothing(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path, format="BMP")
    assert np.array_equal(load_image(path), PICTURE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What each orientation does to a picture, undone before saving.
    undo = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: np.rot90(p, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(undo(corners()))
    path = save_picture(tmp_path / "a.jpg", stored, exif=exif, quality=95)
    loaded = load_image(path)
    assert loaded.shape == (48, 64, 3)
    assert corner_names(loaded) == "RGBW"


def test_damaged_exif_is_passed_over(tmp_path):
    path = save_picture(tmp_path / "a.jpg", corners(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert corner_names(load_image(path)) == "RGBW"


@pytest.mark.parametrize("alpha", [0, 64, 255])
def test_alpha_is_laid_over_white(tmp_path, alpha):
    pixels = np.concatenate([PICTURE, np.full((24, 32, 1), alpha, np.uint8)], axis=2)
    expected = PICTURE * (alpha / 255) + 255 * (1 - alpha / 255)
    loaded = load_image(save_picture(tmp_path / "a.png", pixels))
    assert np.abs(loaded - expected).max() <= 1


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    pixels = np.stack([np.full((8, 8), 100, np.uint8), np.full((8, 8), 51, np.uint8)], axis=2)
    loaded = load_image(save_picture(tmp_path / "a.png", pixels))
    assert (loaded == 224).all()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_a_transparent_colour(tmp_path, suffix):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 10, 20, 0, 0, 255])
    image.putpixel((3, 3), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=0)
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert tuple(loaded[0, 0]) == (255, 255, 255)
    assert tuple(loaded[3, 3]) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_plain_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(PICTURE).convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_is_scaled(tmp_path):
    # Pillow cannot write this one, so the file is put together here.
    rows = b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 514, 51400)
    save_raw_png(tmp_path / "a.png", width=2, height=1, bits=16, kind=2, rows=rows)
    assert load_image(tmp_path / "a.png").tolist() == [[[0, 128, 255], [1, 2, 200]]]


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(corners()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert corner_names(load_image(tmp_path / "a.jpg")) == "RGBW"


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (40, 200)]
    for suffix in ("gif", "webp", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (load_image(path) == 40).all()


def test_colour_profile_is_converted_to_srgb(tmp_path):
    grey = np.full((4, 4, 3), 128, np.uint8)
    plain = load_image(save_picture(tmp_path / "plain.png", grey))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = load_image(save_picture(tmp_path / "srgb.png", PICTURE, icc_profile=srgb))
    assert np.array_equal(same, PICTURE)
    linear = load_image(save_picture(tmp_path / "linear.png", grey, icc_profile=linear_profile()))
    # 50 % of the light is level 188 in sRGB.
    assert np.abs(linear.astype(int) - 188).max() <= 2
    assert (plain == 128).all()
    damaged = save_picture(tmp_path / "bad.png", grey, icc_profile=b"not a profile")
    assert (load_image(damaged) == 128).all()


def test_pixels_are_counted_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    save_raw_png(path, width=50_000, height=50_000, bits=8, kind=2, rows=b"")
    with pytest.raises(MediaError, match="megapixels") as caught:
        load_image(path)
    assert caught.value.code == "MEDIA_TOO_LARGE"


@pytest.mark.parametrize(
    "limits", [MediaLimits(max_image_pixels=767), MediaLimits(max_image_bytes=100)]
)
def test_limits_are_kept(tmp_path, limits):
    path = save_picture(tmp_path / "a.png", PICTURE)
    assert load_image(path, limits=MediaLimits(max_image_pixels=768)).shape == PICTURE.shape
    with pytest.raises(MediaError) as caught:
        load_image(path, limits=limits)
    assert caught.value.code == "MEDIA_TOO_LARGE"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf  <?xml version='1.0'?><svg xmlns='x'/>", "SVG"),
        (b'  {"error": "no such file"}', "JSON"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\1", "PSD"),
        (b"II*\0\10\0\0\0", "TIFF"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x20ftypheic", "convert it to JPEG"),
        (b"anything", "unknown"),
    ],
)
def test_other_kinds_are_named_and_refused(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=words) as caught:
        load_image(path, field="reference")
    assert caught.value.code == "UNSUPPORTED_MEDIA"
    assert caught.value.field == "reference"
    assert "Allowed: JPEG, PNG, WebP, BMP, GIF" in caught.value.message


def test_a_cut_file_is_refused(tmp_path):
    whole = save_picture(tmp_path / "a.jpg", PICTURE).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match="damaged") as caught:
        load_image(tmp_path / "cut.jpg")
    assert caught.value.code == "MEDIA_CORRUPT"


def linear_profile() -> bytes:
    """Returns the sRGB profile with its tone curves replaced by straight ones."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image = io.BytesIO(data)
    for number in range(struct.unpack(">I", data[128:132])[0]):
        name, offset, size = struct.unpack(">4sII", data[132 + 12 * number : 144 + 12 * number])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + bytes(8)  # no points: the identity
            data[offset : offset + size] = curve + bytes(size - len(curve))
        elif name == b"desc":
            text = bytes(data[offset : offset + size])
            data[offset : offset + size] = text.replace(b"\0s\0R\0G\0B", b"\0l\0i\0n\0 ")
    assert image.getvalue() != bytes(data)
    return bytes(data)


def save_raw_png(path, *, width, height, bits, kind, rows):
    """Writes a PNG from its header values and unpacked rows, which need not fit together."""
    import zlib

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
