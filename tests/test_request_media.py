"""Pictures and videos of a request: kinds, precedence, paths, and what each mode needs."""

from __future__ import annotations

import pytest

from tests.serving.requests import FLAT, IMAGE, LEAST, NESTED, VIDEO, codes, parse, refused, scail
from xicon_infer.request import Media

PATH = "/runpod-volume/in/b.png"
DATA = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("fields", "media", "warnings"),
    [
        ({"image": IMAGE}, Media("url", IMAGE), []),
        ({"image": DATA}, Media("base64", DATA), []),
        ({"image": PATH}, Media("path", PATH), []),
        ({"image": {"url": IMAGE}}, Media("url", IMAGE), []),
        ({"image": {"url": DATA}}, Media("base64", DATA), []),
        ({"image": {"base64": "AAAA"}}, Media("base64", "AAAA"), []),
        ({"image": {"path": PATH, "url": None, "base64": ""}}, Media("path", PATH), []),
        ({"image": {"path": IMAGE}}, Media("url", IMAGE), ["MEDIA_KIND"]),
        ({"image_base64": "AA=="}, Media("base64", "AA=="), []),
        ({"image_base64": DATA.upper()}, Media("base64", DATA.upper()), []),
        ({"image_url": DATA}, Media("base64", DATA), []),
        ({"image_path": DATA}, Media("base64", DATA), []),
        ({"image_path": IMAGE}, Media("url", IMAGE), ["MEDIA_KIND"]),
        ({"image_path": "", "image_url": IMAGE}, Media("url", IMAGE), []),
        ({"image": "", "image_url": IMAGE}, Media("url", IMAGE), []),
        ({"image": {"url": ""}, "image_url": IMAGE}, Media("url", IMAGE), []),
        ({"images": {"reference_image": PATH}}, Media("path", PATH), []),
        ({"images": {"reference_image": {"base64": "AAAA"}}}, Media("base64", "AAAA"), []),
        ({"image": IMAGE, "image_path": PATH}, Media("url", IMAGE), ["MEDIA_PRECEDENCE"]),
        ({"image_path": PATH, "image_url": IMAGE}, Media("path", PATH), ["MEDIA_PRECEDENCE"]),
        ({"image_url": IMAGE, "image_base64": "A"}, Media("url", IMAGE), ["MEDIA_PRECEDENCE"]),
        (
            {"image_base64": "AAAA", "images": {"reference_image": IMAGE}},
            Media("base64", "AAAA"),
            ["MEDIA_PRECEDENCE"],
        ),
        (
            {"image": IMAGE, "image_path": PATH, "image_url": IMAGE, "image_base64": "AAAA"},
            Media("url", IMAGE),
            ["MEDIA_PRECEDENCE"],
        ),
    ],
)
def test_sources(fields, media, warnings):
    request = parse({"video": VIDEO, **fields})
    assert request.media["image"] == media
    assert request.resolved["image"] == {"kind": media.kind, "value": media.value}
    assert codes(request) == warnings


@pytest.mark.parametrize(
    ("mode", "given", "kept", "warnings"),
    [
        ("wan_t2v", ("image", "video", "pose_video"), (), ["UNUSED_FIELD"]),
        ("wan_i2v", ("image", "video", "pose_video"), ("image",), ["UNUSED_FIELD"]),
        ("wan_i2v", ("image",), ("image",), []),
        ("pose_only", ("image", "video", "pose_video"), ("image", "video"), ["UNUSED_FIELD"]),
        ("scail", ("image", "video", "pose_video"), ("image", "video", "pose_video"), []),
        ("steady_dancer", ("image", "pose_video"), ("image", "pose_video"), []),
    ],
)
def test_modes_keep_what_they_use(mode, given, kept, warnings):
    request = parse({"mode": mode, "prompt": "p", **dict.fromkeys(given, VIDEO)})
    assert tuple(request.media) == kept
    assert codes(request) == warnings
    for role in ("image", "video", "pose_video"):
        assert (request.resolved[role] is not None) == (role in kept)


def test_what_is_dropped_is_not_looked_at():
    fields = {"mode": "wan_t2v", "prompt": "p", "image": "http://10.0.0.1/", "video_path": "/x"}
    assert codes(parse(fields)) == ["UNUSED_FIELD"]


@pytest.mark.parametrize("mode", ["scail", "steady_dancer", "pose_only"])
def test_default_driving_video(mode):
    fields = {name: value for name, value in LEAST[mode].items() if name != "video"}
    assert refused(fields).code == "DRIVING_VIDEO_REQUIRED"
    request = parse(fields, default_driving_video=True)
    assert request.media["video"] == Media("default", None)
    assert codes(request) == ["DEFAULT_VIDEO_USED"]
    if mode != "pose_only":
        rendered = parse({**fields, "pose_video": VIDEO}, default_driving_video=True)
        assert (rendered.resolved["video"], codes(rendered)) == (None, [])


def test_nested_requests_may_leave_the_video_empty():
    for videos in ({}, {"dance_video": None}, {"dance_video": ""}):
        fields = {**NESTED, "videos": videos}
        assert codes(parse(fields, default_driving_video=True)) == ["DEFAULT_VIDEO_USED"]
        assert refused(fields).code == "DRIVING_VIDEO_REQUIRED"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/runpod-volume",
        "/runpod-volume/",
        "/runpod-volume/..",
        "/runpod-volume/../etc/passwd",
        "/runpod-volume/a/../../etc/passwd",
        "/runpod-volume-evil/x.png",
        "//etc/passwd",
        "/runpod-volume/a\0.png",
        "/runpod-volume/\ud800.png",
        "/runpod-volume/" + "a" * 5000,
        "in/b.png",
        "../runpod-volume/b.png",
        "~/b.png",
        "/proc/self/environ",
    ],
)
def test_paths_outside_are_refused(path):
    error = refused({**FLAT, "image_path": path, "image_url": ""})
    assert (error.code, error.field) == ("PATH_NOT_ALLOWED", "image")


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/runpod-volume/b.png", "/runpod-volume/b.png"),
        ("//runpod-volume//./in/b.png", PATH),
        ("/runpod-volume/x/../in/b.png", PATH),
        ("/runpod-volume/ein Bild ü.png", "/runpod-volume/ein Bild ü.png"),
    ],
)
def test_paths_inside_are_taken_plain(path, plain):
    assert parse({**FLAT, "image_path": path, "image_url": ""}).media["image"] == Media(
        "path", plain
    )


def test_input_roots_are_a_setting():
    roots = {"XICON_INPUT_ROOTS": "/data/in/:/more/../media"}
    for path in ("/data/in/a.png", "/media/a.png"):
        assert parse(scail(image=path), roots).media["image"].value == path
    assert refused(scail(image=PATH), roots).code == "PATH_NOT_ALLOWED"
    assert parse(scail(image="/vol/a.png"), {"NETWORK_VOLUME_PATH": "/vol"}).media["image"].value


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ("data:image/png;base64,", True),
        ("data:video/mp4;codecs=avc1;base64,AAAA", True),
        ("data:application/octet-stream;base64,AAAA", True),
        ("data:image/svg+xml;base64,AAAA", True),
        ("data:application/pdf;base64,AAAA", False),
        ("data:;base64,AAAA", False),
        ("data:image/png;base64", False),
        ("data:image/png;" + "a=b;" * 100 + "base64,AAAA", False),
    ],
)
def test_data_addresses(value, fits):
    if fits:
        assert parse(scail(image=value)).media["image"].kind == "base64"
    else:
        assert refused(scail(image=value)).code == "INVALID_BASE64"


def test_base64_is_measured_without_decoding():
    limits = {"XICON_MAX_IMAGE_BYTES": "30", "XICON_MAX_VIDEO_BYTES": "60"}
    text = "AAAA\n" * 10  # 30 bytes
    assert parse(scail(image={"base64": text}), limits).media["image"].kind == "base64"
    assert refused(scail(image={"base64": "AAAA" * 11}), limits).code == "MEDIA_TOO_LARGE"
    assert parse(scail(video={"base64": "AAAA" * 20}), limits).media["video"].kind == "base64"
    assert refused(scail(video={"base64": "AAAA" * 21}), limits).code == "MEDIA_TOO_LARGE"


def test_values_are_not_in_the_repr():
    secret = "data:image/png;base64,SECRET"
    request = parse(scail(image=secret, prompt="a secret", metadata={"k": "secret"}))
    assert "secret" not in repr(request).lower()
