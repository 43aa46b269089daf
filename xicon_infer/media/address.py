"""Which URLs may be fetched: the rules that need no name server and no request.

`check_url` decides by the text of a URL alone; `is_public` decides about one address, and is
asked again for every address that a name resolves to. The list of networks is our own: the
tables of the standard library differ between its versions and let some private ones pass.

Source: IANA special-purpose address registries; runpod/runpod-python: rp_ssrf (what it leaves
open).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TypeAlias

from xicon_infer.errors import InvalidRequest
from xicon_infer.settings import Settings

MAX_URL_CHARACTERS = 8192
_MAX_HOST_CHARACTERS = 253
_MAX_SCHEME_CHARACTERS = 64

DEFAULT_PORTS = {"http": 80, "https": 443}

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_BLOCKED_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_BLOCKED_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "::/128",
        "::1/128",
        "::/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)
BLOCKED_NETWORKS = (*_BLOCKED_V4, *_BLOCKED_V6)

_LOCAL_NAMES = ("localhost", "local", "internal")
"""A host of this name, or below it, is never on the internet."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_PORT = re.compile(r"[0-9]{1,5}")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PARTS = (
    (re.compile(r"0x[0-9a-f]*"), 2, 16),
    (re.compile(r"0[0-7]+"), 1, 8),
    (re.compile(r"0|[1-9][0-9]*"), 0, 10),
)
"""How one part of an IPv4 address is spelled, how many characters come before it, its base."""


@dataclass(frozen=True)
class Target:
    """Where a URL leads: scheme http or https, host in lower-case ASCII, port.

    host: a name without a trailing dot, or an address without brackets. address: the one that
    the host spells, None for a name.
    """

    scheme: str
    host: str
    port: int
    address: Address | None


def check_url(url: str, field: str, settings: Settings) -> None:
    """Refuses a URL that must not be fetched, as far as its text tells.

    Args:
        url: as received.
        field: of the request, named in the error.
        settings: require_https, allowed_ports, url_allowlist and allow_private_urls count.

    Raises:
        InvalidRequest: URL_INVALID, URL_SCHEME or URL_BLOCKED.
    """
    target = split_url(url, field, settings)
    if target.port not in settings.allowed_ports:
        message = f"URL port {target.port} is not allowed for '{field}'"
        raise InvalidRequest(message, field=field, code="URL_BLOCKED")
    if not _host_allowed(target, settings):
        message = f"URL host is not allowed for '{field}'"
        raise InvalidRequest(message, field=field, code="URL_BLOCKED")


def split_url(url: str, field: str, settings: Settings) -> Target:
    """Returns where a URL leads; does not look at whether it may.

    Raises:
        InvalidRequest: URL_INVALID or URL_SCHEME.
    """
    if len(url) > MAX_URL_CHARACTERS or any(_forbidden(character) for character in url):
        raise _invalid(field, "is malformed")
    found = _SCHEME.match(url)
    if not found:
        raise _invalid(field, "is malformed")
    scheme = found[1].lower()
    if scheme not in ("http", "https") or (scheme == "http" and settings.require_https):
        name = scheme if len(scheme) <= _MAX_SCHEME_CHARACTERS else scheme[:61] + "..."
        message = f"Unsupported URL scheme '{name}' for '{field}'"
        raise InvalidRequest(message, field=field, code="URL_SCHEME")
    rest = url[found.end() :]
    authority = re.split(r"[/?#]", rest[2:], maxsplit=1)[0] if rest.startswith("//") else ""
    if "@" in authority:
        raise _invalid(field, "must not contain credentials")
    host, port = _split_authority(authority, field)
    if not host:
        raise _invalid(field, "has no host")
    name, address = _read_host(host, field)
    return Target(scheme, name, DEFAULT_PORTS[scheme] if port is None else port, address)


def is_public(address: str | Address) -> bool:
    """Returns True if an address is on the public internet; IPv4 in IPv6 is unwrapped first.

    Args:
        address: an address, or its plain spelling; anything else is not public.
    """
    if isinstance(address, str):
        try:
            address = ipaddress.ip_address(address)
        except ValueError:
            return False
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is None:
            return not any(address in network for network in _BLOCKED_V6)
        address = mapped
    return not any(address in network for network in _BLOCKED_V4)


def _forbidden(character: str) -> bool:
    """Returns True for blanks, control characters, backslashes and halves of surrogate pairs."""
    code = ord(character)
    return code <= 32 or code == 127 or character == "\\" or _rare(character, code)


def _rare(character: str, code: int) -> bool:
    return code > 127 and (
        code < 160 or character.isspace() or 0xD800 <= code <= 0xDFFF or code in (0x200B, 0xFEFF)
    )


def _invalid(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"URL for '{field}' {problem}", field=field, code="URL_INVALID")


def _split_authority(authority: str, field: str) -> tuple[str, int | None]:
    """Returns host, with its brackets, and port; None for no port."""
    if authority.startswith("["):
        end = authority.find("]") + 1
        if end == 0 or authority[end : end + 1] not in ("", ":"):
            raise _invalid(field, "is malformed")
        host, tail = authority[:end], authority[end:]
    else:
        host, colon, after = authority.partition(":")
        tail = colon + after
    if tail in ("", ":"):
        return host, None
    if not _PORT.fullmatch(tail[1:]) or int(tail[1:]) > 65535:
        raise _invalid(field, "is malformed")
    return host, int(tail[1:])


def _read_host(host: str, field: str) -> tuple[str, Address | None]:
    """Returns the host in ASCII, and the address that it spells if it does."""
    if host.startswith("["):
        try:
            inside = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise _invalid(field, "is malformed") from None
        return str(inside), inside
    try:
        # The name preparation maps other scripts' digits and dots to ASCII, as resolvers do.
        name = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        raise _invalid(field, "is malformed") from None
    if len(name) > _MAX_HOST_CHARACTERS or not _HOST.fullmatch(name):
        raise _invalid(field, "is malformed")
    if not _NUMERIC.fullmatch(name.rsplit(".", 1)[-1]):
        return name, None
    return name, _read_ipv4(name)


_NOWHERE = ipaddress.IPv4Address("0.0.0.0")


def _read_ipv4(name: str) -> ipaddress.IPv4Address:
    """Returns the address that a host ending in a number spells, in any way inet_aton reads.

    One that no resolver reads alike, for example 1.2.3.4.5 or 08.8.8.8, is taken as 0.0.0.0,
    which is not public.
    """
    parts = name.split(".")
    numbers = [_read_part(part) for part in parts]
    if len(parts) > 4 or None in numbers:
        return _NOWHERE
    *first, last = [number for number in numbers if number is not None]
    if any(number > 255 for number in first) or last >= 256 ** (4 - len(first)):
        return _NOWHERE
    value = last + sum(number << (8 * (3 - index)) for index, number in enumerate(first))
    return ipaddress.IPv4Address(value)


def _read_part(part: str) -> int | None:
    """Returns the number of one part: 0x hexadecimal, leading 0 octal, else decimal."""
    for pattern, skipped, base in _PARTS:
        if pattern.fullmatch(part):
            return int(part[skipped:] or "0", base)
    return None


def _host_allowed(target: Target, settings: Settings) -> bool:
    allowed = settings.url_allowlist
    if allowed and not any(_below(target.host, suffix) for suffix in allowed):
        return False
    if settings.allow_private_urls:
        return True
    if target.address is not None:
        return is_public(target.address)
    return not any(_below(target.host, name) for name in _LOCAL_NAMES)


def _below(host: str, suffix: str) -> bool:
    return host == suffix or host.endswith("." + suffix)
