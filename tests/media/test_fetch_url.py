"""Addresses, names, redirects: where a fetch may go, and what it says there."""

from __future__ import annotations

import hashlib
import socket

import pytest

from tests.media.fetching import PNG, get
from tests.media.hostile_server import GONE, OTHER, PRIVATE, PUBLIC, World, answer, redirect
from tests.media.hostile_server import hostile_server as started
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.fetch_types import FetchLimits

URL = "http://cdn.example.com/a.png"


@pytest.fixture
def server():
    with started() as running:
        running.page("/a.png", answer(PNG))
        yield running


def refusal(world, folder, url, **options):
    """Returns the error; nothing may be left in the folder."""
    with pytest.raises((InvalidRequest, MediaError)) as caught:
        get(world, folder, url, **options)
    assert list(folder.iterdir()) == []
    assert caught.value.field == options.get("field", "image")
    return caught.value


def test_a_file_arrives_whole(tmp_path, server):
    world = World(server)
    found = get(world, tmp_path, URL)
    assert found.path == tmp_path / "image.png"
    assert found.path.read_bytes() == PNG
    assert found.path.stat().st_mode & 0o777 == 0o600
    assert (found.bytes, found.kind, found.tries) == (len(PNG), "PNG", 1)
    assert found.sha256 == hashlib.sha256(PNG).hexdigest()
    assert 0 < found.seconds < 5
    assert world.dialled == [(PUBLIC, 80, None)]
    assert world.looked_up == [("cdn.example.com", 5.0)]


def test_the_request_tells_nothing_about_us(tmp_path, server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine cdn.example.com login me password pass\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    server.page("/go", redirect("/a.png?x=1"))
    get(World(server), tmp_path, "http://cdn.example.com:8080/go#part")
    head = server.requests["/a.png?x=1"][0].split("\r\n")
    assert head[0] == "GET /a.png?x=1 HTTP/1.1"
    lines = dict(line.split(": ", 1) for line in head[1:] if line)
    assert lines.pop("User-Agent").startswith("xicon-infer/")
    assert lines == {
        "Host": "cdn.example.com:8080",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        (
            "http://CDN.example.com./ä b.png".replace(" ", "%20"),
            "cdn.example.com",
            "/%C3%A4%20b.png",
        ),
        ("http://bücher.example/?q=ü", "xn--bcher-kva.example", "/?q=%C3%BC"),
        ("http://cdn.example.com?q", "cdn.example.com", "/?q"),
        ("http://93.184.215.14/a", "93.184.215.14", "/a"),
    ],
)
def test_how_an_address_is_sent(tmp_path, server, url, host, target):
    server.pages.update(dict.fromkeys((target.split("?")[0],), lambda number: [answer(PNG)]))
    world = World(server)
    get(world, tmp_path, url)
    assert f"Host: {host}\r\n" in server.requests[target][0]
    assert world.looked_up[0][0] == host


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/a.png", "URL_BLOCKED"),
        ("http://2130706433/a.png", "URL_BLOCKED"),
        ("http://[::ffff:10.0.0.1]/", "URL_BLOCKED"),
        ("http://localhost/a.png", "URL_BLOCKED"),
        ("http://cdn.example.com:22/a.png", "URL_BLOCKED"),
        ("http://u:p@cdn.example.com/", "URL_INVALID"),
        ("file:///etc/passwd", "URL_SCHEME"),
        ("ftp://cdn.example.com/a.png", "URL_SCHEME"),
    ],
)
def test_refused_by_its_text(tmp_path, url, code):
    world = World(None)
    assert refusal(world, tmp_path, url).code == code
    assert world.looked_up == world.dialled == []


@pytest.mark.parametrize(
    "addresses",
    [
        [PRIVATE],
        [PUBLIC, PRIVATE],
        [PUBLIC, "::1"],
        ["169.254.169.254"],
        ["2002:a00:1::"],
        ["::ffff:127.0.0.1"],
        ["fe80::1%eth0"],
    ],
)
def test_a_name_with_any_address_that_is_not_public(tmp_path, addresses):
    world = World(None, {"cdn.example.com": [addresses]})
    error = refusal(world, tmp_path, URL)
    assert (error.code, error.message) == ("URL_BLOCKED", "URL host is not allowed for 'image'")
    assert world.dialled == []


def test_private_networks_can_be_allowed(tmp_path, server):
    world = World(server, {"nas.local": [[PRIVATE]]}, reachable=(PRIVATE,))
    limits = FetchLimits(allow_private_urls=True)
    assert get(world, tmp_path, "http://nas.local/a.png", limits=limits).kind == "PNG"
    assert world.dialled == [(PRIVATE, 80, None)]


def test_a_second_answer_of_the_name_server_is_never_asked_for(tmp_path, server):
    server.pages_in_turn("/go", answer(status=503), redirect("/a.png"))
    world = World(server, {"cdn.example.com": [[PUBLIC], [PRIVATE]]})
    assert get(world, tmp_path, "http://cdn.example.com/go").tries == 2
    assert len(world.looked_up) == 1
    assert {address for address, *_ in world.dialled} == {PUBLIC}


def test_the_next_address_is_tried(tmp_path, server):
    world = World(server, {"cdn.example.com": [[GONE, OTHER, PUBLIC]]})
    assert get(world, tmp_path, URL).tries == 1
    assert [address for address, *_ in world.dialled] == [GONE, OTHER]


def test_nobody_answers(tmp_path):
    world = World(None, {"cdn.example.com": [[GONE]]})
    error = refusal(world, tmp_path, URL)
    assert error.code == "FETCH_FAILED"
    assert "cannot be reached (3 tries)" in error.message
    assert world.waits == [1.0, 3.0]


def test_a_name_that_is_not_known_is_not_asked_for_again(tmp_path):
    unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
    world = World(None, {"cdn.example.com": [unknown]})
    error = refusal(world, tmp_path, URL)
    assert (error.code, world.waits) == ("FETCH_FAILED", [])
    assert "not known" in error.message


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "later"), "FETCH_FAILED"),
        (TimeoutError(), "FETCH_TIMEOUT"),
    ],
)
def test_a_hiccup_of_the_name_server(tmp_path, server, fault, code):
    world = World(server, {"cdn.example.com": [fault, [PUBLIC]]})
    assert get(world, tmp_path, URL).tries == 2
    (tmp_path / "image.png").unlink()
    world = World(server, {"cdn.example.com": [fault]})
    assert refusal(world, tmp_path, URL).code == code


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1:80/secret", "URL_BLOCKED"),
        ("http://169.254.169.254/latest/meta-data/", "URL_BLOCKED"),
        ("http://0x7f.1/", "URL_BLOCKED"),
        ("//localhost/secret", "URL_BLOCKED"),
        ("http://inside.example/", "URL_BLOCKED"),
        ("http://cdn.example.com:25/", "URL_BLOCKED"),
        ("file:///etc/passwd", "URL_SCHEME"),
        ("gopher://cdn.example.com/", "URL_SCHEME"),
        ("http://u:p@cdn.example.com/", "URL_INVALID"),
        ("http://[/", "URL_INVALID"),
        ("", "FETCH_FAILED"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_go_through_all_rules(tmp_path, server, location, code, status):
    server.page("/go", redirect(location, status))
    world = World(server, {"inside.example": [[PUBLIC, PRIVATE]]})
    error = refusal(world, tmp_path, "http://cdn.example.com/go")
    assert error.code == code
    assert world.dialled == [(PUBLIC, 80, None)]
    for secret in ("secret", "meta-data", "127.0", "10.1", "passwd"):
        assert secret not in error.message


def test_five_redirects_and_no_more(tmp_path, server):
    for number in range(6):
        server.page(f"/{number}", redirect(f"/{number + 1}"))
    server.page("/6", answer(PNG))
    assert get(World(server), tmp_path, "http://cdn.example.com/1").kind == "PNG"
    (tmp_path / "image.png").unlink()
    error = refusal(World(server), tmp_path, "http://cdn.example.com/0")
    assert error.code == "FETCH_FAILED"
    assert "more than 5 times" in error.message
    one = FetchLimits(max_redirects=1)
    assert refusal(World(server), tmp_path, "http://cdn.example.com/1", limits=one)


def test_never_back_from_https_to_http(tmp_path, server):
    server.page("/up", redirect("https://cdn.example.com/a.png"))
    server.page("/down", redirect("http://cdn.example.com/a.png"))
    world = World(server)
    assert get(world, tmp_path, "http://cdn.example.com/up").kind == "PNG"
    assert world.dialled[-1] == (PUBLIC, 443, "cdn.example.com")
    (tmp_path / "image.png").unlink()
    error = refusal(World(server), tmp_path, "https://cdn.example.com/down")
    assert error.code == "URL_BLOCKED"
    assert "from https to http" in error.message


def test_the_settings_count(tmp_path, server):
    def code(**options):
        return refusal(World(server), tmp_path, URL, limits=FetchLimits(**options)).code

    assert code(require_https=True) == "URL_SCHEME"
    assert code(url_allowlist=("other.example",)) == "URL_BLOCKED"
    assert code(allowed_ports=(443,)) == "URL_BLOCKED"
    assert get(World(server), tmp_path, URL, limits=FetchLimits(url_allowlist=("example.com",)))


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 410])
def test_a_final_answer_is_not_asked_for_again(tmp_path, server, status):
    server.page("/a.png", answer(PNG, status))
    world = World(server)
    error = refusal(world, tmp_path, URL)
    assert (error.code, world.waits) == ("FETCH_FAILED", [])
    assert f"answered {status}" in error.message
    assert "Some Reason" not in error.message
