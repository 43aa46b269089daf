"""Files on this machine: only below the roots, only regular files, opened once."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.media.fetching import PNG, take
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.fetch_network import REAL
from xicon_infer.media.fetch_path import _locate, _open_below
from xicon_infer.media.fetch_sink import Intake, Tally
from xicon_infer.media.fetch_types import FetchLimits
from xicon_infer.media.source import MediaLimits


@pytest.fixture
def places(tmp_path):
    """Returns a root with a file, a secret beside it, and the folder of a job."""
    root, outside, folder = tmp_path / "in", tmp_path / "outside", tmp_path / "job"
    for place in (root / "sub", outside, folder, tmp_path / "in-other"):
        place.mkdir(parents=True)
    for place in (root, root / "sub", outside, tmp_path / "in-other"):
        (place / "a.png").write_bytes(PNG)
    return root, outside, folder


def intake_of(folder, limits):
    tally = Tally(folder, limits, REAL)
    return Intake("image", "image", limits, REAL, threading.Event(), tally, REAL.now() + 60)


def limits_of(*roots, **options):
    return FetchLimits(input_roots=roots, **options)


def refusal(folder, path, limits):
    with pytest.raises((InvalidRequest, MediaError)) as caught:
        take(folder, "path", str(path), limits=limits)
    assert list(folder.iterdir()) == []
    for part in ("/", "outside", "a.png", "pytest"):
        assert part not in caught.value.message.removesuffix("directory")
    return caught.value.code


def test_files_below_a_root(places):
    root, outside, folder = places
    limits = limits_of(outside, root)
    for text in (
        f"{root}/a.png",
        f"{root}//sub/.//../a.png",
        f"{root}/sub/a.png",
        f"{outside}/a.png",
    ):
        found = take(folder, "path", text, limits=limits)
        assert (found.path, found.path.read_bytes()) == (folder / "image.png", PNG)
        assert not found.path.is_symlink()
        assert found.path.stat().st_nlink == 1


@pytest.mark.parametrize(
    "text",
    [
        "{outside}/a.png",
        "{outside}/missing.png",
        "{root}/../outside/a.png",
        "{root}/../outside/missing.png",
        "{root}-other/a.png",
        "{root}/link.png",
        "{root}/linked/a.png",
        "{root}/linked/missing.png",
        "{root}/up/outside/a.png",
        "/etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "a.png",
        "in/a.png",
        "../in/a.png",
        "~/a.png",
        "",
        "{root}/a.png\0.txt",
        "{root}/\ud800",
        "file://{root}/a.png",
    ],
)
def test_nothing_outside_of_the_roots(places, text):
    root, outside, folder = places
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "linked").symlink_to(outside)
    (root / "up").symlink_to("..")
    text = text.format(root=root, outside=outside)
    assert refusal(folder, text, limits_of(root)) == "PATH_NOT_ALLOWED"
    assert refusal(folder, text, limits_of()) == "PATH_NOT_ALLOWED"


def test_links_that_stay_below_a_root(places):
    root, outside, folder = places
    (root / "link.png").symlink_to("sub/a.png")
    (root / "across.png").symlink_to(outside / "a.png")
    assert take(folder, "path", f"{root}/link.png", limits=limits_of(root)).kind == "PNG"
    assert take(folder, "path", f"{root}/across.png", limits=limits_of(root, outside))


def test_a_root_may_be_a_link_itself(places, tmp_path):
    root, _, folder = places
    (tmp_path / "volume").symlink_to(root)
    text = f"{tmp_path}/volume/a.png"
    assert take(folder, "path", text, limits=limits_of(tmp_path / "volume")).kind == "PNG"


def test_what_is_not_a_regular_file(places):
    root, _, folder = places
    os.mkfifo(root / "pipe.png")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(root, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    codes = {
        "pipe.png": "UNSUPPORTED_MEDIA",
        "socket": "UNSUPPORTED_MEDIA",
        "sub": "UNSUPPORTED_MEDIA",
        "": "UNSUPPORTED_MEDIA",
        "missing.png": "MEDIA_NOT_FOUND",
        "missing/a.png": "MEDIA_NOT_FOUND",
        "a.png/b.png": "MEDIA_NOT_FOUND",
        "dangling": "MEDIA_NOT_FOUND",
        "loop": "UNSUPPORTED_MEDIA",
        "n" * 300: "MEDIA_NOT_FOUND",
    }
    found = {name: refusal(folder, f"{root}/{name}", limits_of(root)) for name in codes}
    assert found == codes


@pytest.mark.parametrize(
    "path", ["/proc/self/environ", "/dev/zero", "/sys/kernel/mm", "/dev/stdin"]
)
def test_the_system_is_no_input_even_without_roots(places, path):
    folder = places[2]
    assert refusal(folder, path, FetchLimits(input_roots=None)) == "PATH_NOT_ALLOWED"
    assert refusal(folder, path, limits_of("/")) == "PATH_NOT_ALLOWED"


@pytest.mark.parametrize("exchanged", ["file", "folder"])
def test_a_link_put_in_the_way_after_the_check_leads_nowhere(places, exchanged):
    root, outside, folder = places
    intake = intake_of(folder, limits_of(root))
    place, inside = _locate(f"{root}/sub/a.png", intake)
    os.close(_open_below(place, inside, intake))
    if exchanged == "file":
        (root / "sub" / "a.png").unlink()
        (root / "sub" / "a.png").symlink_to(outside / "a.png")
    else:
        (root / "sub").rename(root / "old")
        (root / "sub").symlink_to(outside)
    with pytest.raises((MediaError, NotADirectoryError)):
        _open_below(place, inside, intake)


def test_large_files_are_not_read(places):
    root, _, folder = places
    with (root / "big.png").open("wb") as file:
        file.truncate(10**11)
    assert refusal(folder, root / "big.png", limits_of(root)) == "MEDIA_TOO_LARGE"
    media = MediaLimits(max_image_bytes=len(PNG) - 1)
    assert refusal(folder, root / "a.png", limits_of(root, media=media)) == "MEDIA_TOO_LARGE"
    (root / "empty.png").touch()
    assert refusal(folder, root / "empty.png", limits_of(root)) == "MEDIA_CORRUPT"


def test_a_file_that_may_not_be_read(places):
    root, _, folder = places
    (root / "a.png").chmod(0)
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    assert refusal(folder, root / "a.png", limits_of(root)) == "MEDIA_NOT_FOUND"
