"""Which addresses the worker goes to: every spelling of those that it does not."""

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.address import BLOCKED_NETWORKS, check_url, is_public, split_url
from xicon_infer.settings import read_settings

DEFAULT = read_settings({})
PRIVATE = read_settings({"XICON_ALLOW_PRIVATE_URLS": "1"})


def code(url: str, env: dict[str, str] | None = None) -> str:
    """Returns the code of the refusal of an address, "" if it is allowed."""
    try:
        check_url(url, "image", read_settings(env or {}))
    except InvalidRequest as error:
        assert error.field == "image"
        assert len(error.message) < 130
        return error.code
    return ""


def spellings(value: int) -> list[str]:
    """Returns the ways to write an IPv4 address that inet_aton and browsers read."""
    a, b, c, d = value.to_bytes(4, "big")
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | value)
    return [
        f"{a}.{b}.{c}.{d}",
        f"{a}.{b}.{c}.{d}.",
        str(value),
        hex(value),
        f"0X{value:X}",
        f"0{value:o}",
        f"00{value:o}",
        f"{a}.{value & 0xFFFFFF}",
        f"{a}.{b}.{value & 0xFFFF}",
        f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{a}.{b:#x}.0{value & 0xFFFF:o}",
        f"[{mapped}]",
        f"[::ffff:{a}.{b}.{c}.{d}]",
        "".join(chr(0xFF10 + int(digit)) for digit in str(value)),
        f"{a}\u3002{b}\uff0e{c}\uff61{d}",
    ]


@pytest.mark.parametrize("network", BLOCKED_NETWORKS, ids=str)
def test_every_network_is_blocked_and_its_neighbours_are_not(network):
    seeded = random.Random(7)
    first, last = int(network[0]), int(network[-1])
    make = type(network[0])
    for value in (first, last, (first + last) // 2, seeded.randint(first, last)):
        assert not is_public(make(value))
        host = str(make(value))
        hosts = spellings(value) if network.version == 4 else [f"[{host}]"]
        assert {code(f"http://{each}/x") for each in hosts} == {"URL_BLOCKED"}
    for value in (first - 1, last + 1):
        if 0 <= value < 2 ** (32 if network.version == 4 else 128):
            inside = any(
                make(value) in other
                for other in BLOCKED_NETWORKS
                if other.version == network.version
            )
            mapped = getattr(make(value), "ipv4_mapped", None)
            assert is_public(make(value)) == (not inside and (mapped is None or is_public(mapped)))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_all_spellings_are_the_same_address(value):
    public = is_public(ipaddress.IPv4Address(value))
    for host in spellings(value):
        target = split_url(f"https://{host}/x", "image", DEFAULT)
        address = target.address
        assert address is not None
        plain = getattr(address, "ipv4_mapped", None) or address
        assert int(plain) == value
        assert code(f"https://{host}/x") == ("" if public else "URL_BLOCKED")


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "a.localhost", "a.b.local", "x.internal"),
        *("metadata.google.internal", "metadata.google.internal.", "loc\u00adalhost", "ⓛocalhost"),
        *("1.2.3.4.5", "256.1.1.1", "08.8.8.8", "1.2.3.08", "0x", "1.2.3.0xg.4", "4294967296"),
        *("a.1_0.1", "0x8.8.8.8.0"),
        *("[::1]", "[::]", "[fe80::1%25eth0]", "[2002:a00:1::]", "[64:ff9b::a00:1]"),
    ],
)
def test_hosts_that_are_blocked(host):
    assert code(f"http://{host}/") == "URL_BLOCKED"


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example.com/a.png?x=1&y=a@b#f",
        "HTTPS://CDN.EXAMPLE.COM",
        "http://cdn.example.com:8080/a",
        "https://cdn.example.com:/a",
        "https://cdn.example.com./a",
        "https://bücher.example/Bild ü.png".replace(" ", ""),
        "https://日本.example/図.png",
        "http://8.8.8.8/a",
        "http://134744072/a",
        "https://[2606:4700::1111]/a",
        "https://local.example.com/a",
        "https://my_bucket.s3.example.com/a",
        "https://internal-x.example.com/a",
    ],
)
def test_addresses_that_are_allowed(url):
    assert code(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        *("", "cdn.example.com/a", "//cdn.example.com/a", "/a", "https://a b.com/", "https:// a"),
        *("https://a.com/\n", "https://a.com/\x7f", "https://a.com\\@b.com/", "https://a..com/"),
        *("https://a.com:0x50/", "https://a.com:99999/", "https://a.com:-1/", "https://a:80:80/"),
        *(
            "https://[::1/",
            "https://[::1]a/",
            "https://[zz]/",
            "https://%31/",
            "https://a.com\ud800",
        ),
        *(
            "https://" + "a" * 8200,
            "https://" + "a." * 200 + "com/",
            "https://" + "a" * 64 + ".com/",
        ),
        *("https://a.com/\u200b", "https://a,b.com/", "https://a.com:８０/", "https://*.com/"),
        *("http:example.com", "http:///a", "http://:80/", "https://?a", "https://u:p@a.com/"),
        *("https://@a.com/", "https://a.com@/", "https://a@b@c.com/"),
    ],
)
def test_addresses_that_are_malformed(url):
    assert code(url) == "URL_INVALID"


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "data", "s3", "javascript", "a" * 100])
def test_other_schemes_are_refused(scheme):
    with pytest.raises(InvalidRequest) as caught:
        check_url(f"{scheme.upper()}://example.com/a", "video", DEFAULT)
    assert caught.value.code == "URL_SCHEME"
    name = scheme if len(scheme) <= 64 else "a" * 61 + "..."
    assert caught.value.message == f"Unsupported URL scheme '{name}' for 'video'"


def test_order_of_faults():
    assert code("ftp://u:p@10.0.0.1:22/") == "URL_SCHEME"
    assert code("http://u:p@10.0.0.1:22/") == "URL_INVALID"
    with pytest.raises(InvalidRequest, match="port 22"):
        check_url("http://10.0.0.1:22/", "image", DEFAULT)


def test_settings_change_what_is_allowed():
    assert code("http://a.com/", {"XICON_REQUIRE_HTTPS": "1"}) == "URL_SCHEME"
    assert code("https://a.com/", {"XICON_REQUIRE_HTTPS": "1"}) == ""
    assert code("https://a.com:9000/") == "URL_BLOCKED"
    assert code("https://a.com:9000/", {"XICON_ALLOWED_PORTS": "9000"}) == ""
    assert code("https://a.com/", {"XICON_ALLOWED_PORTS": "9000"}) == "URL_BLOCKED"
    only = {"XICON_URL_ALLOWLIST": "example.com, *.cdn.net"}
    for host, fault in (
        ("example.com", ""),
        ("a.example.com", ""),
        ("x.cdn.net", ""),
        ("evilexample.com", "URL_BLOCKED"),
        ("example.com.evil.net", "URL_BLOCKED"),
        ("8.8.8.8", "URL_BLOCKED"),
    ):
        assert code(f"https://{host}/", only) == fault
    for host in ("10.0.0.1", "localhost", "[::1]"):
        assert code(f"http://{host}/", {"XICON_ALLOW_PRIVATE_URLS": "1"}) == ""
        assert code(f"http://{host}/", {**only, "XICON_ALLOW_PRIVATE_URLS": "1"}) == "URL_BLOCKED"


def test_where_an_address_leads():
    target = split_url("HTTPS://Bücher.Example.:8443/a?b", "image", DEFAULT)
    assert (target.scheme, target.host, target.port) == ("https", "xn--bcher-kva.example", 8443)
    assert target.address is None
    assert split_url("http://a.com", "image", DEFAULT).port == 80
    assert str(split_url("http://[::FFFF:7f00:1]", "image", PRIVATE).address) in (
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
    )


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_text_breaks_it(text):
    for url in (text, f"http://{text}", f"https://a.com:{text}", f"http://[{text}]/"):
        assert code(url) in ("", "URL_INVALID", "URL_SCHEME", "URL_BLOCKED")


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_only_addresses_are_public(text):
    try:
        ipaddress.ip_address(text)
    except ValueError:
        assert not is_public(text)
