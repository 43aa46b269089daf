"""Where the bucket is: from the settings, or from a request, to one checked `BucketConfig`.

People write the bucket into the endpoint, beside it, or both, because each provider's console
shows it differently. Taken apart here, the two can never meet again as `bucket/bucket/key`.
Nothing is guessed: without a bucket or a pair of keys this refuses. Source: runpod/docs: S3
configuration; runpod/runpod-python: rp_upload (whose month-named default bucket is not used).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import SplitResult, quote, urlsplit

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.address import check_url, is_public, split_url
from xicon_infer.media.fetch_network import resolve
from xicon_infer.settings import InvalidSettings, Settings, read_settings

MAX_EXPIRES_S = 604_800
"""Signature version 4 allows no link that lives longer than seven days."""
_MIB = 1024**2
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_AWS = re.compile(
    r"(?:(?P<bucket>.+)\.)?s3(?:[.-]dualstack)?(?:[.-](?P<region>[a-z0-9-]+))?"
    r"\.amazonaws\.com(?:\.cn)?"
)
_R2 = re.compile(
    r"(?:(?P<bucket>[^.]+)\.)??(?P<account>[^.]+)(?:\.(?:eu|fedramp))?\.r2\.cloudflarestorage\.com"
)
_SPACES = re.compile(r"(?:(?P<bucket>.+)\.)?(?P<region>[a-z0-9-]+)\.digitaloceanspaces\.com")
_REGION_IN_HOST = re.compile(r"(?:^|\.)s3\.([a-z]{2,}-[a-z0-9-]+)\.[^.]+\.")
_ACLS = (
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
)
_MAX_PREFIX_BYTES = 512
_RESOLVE_S = 5.0


@dataclass(frozen=True)
class BucketConfig:
    """A bucket, and how to talk to it. Shows no secret when printed.

    endpoint_url: without the bucket. addressing_style: "path" or "virtual". prefix: first part
    of every key, "" for none. url_expires_s: how long a link lives. public_base_url: links are
    this and the key; "" for signed links. acl: canned, "" for none. part_bytes: size above which
    a file is sent in parts of that size, threads at a time. attempts: of each single request.
    """

    endpoint_url: str
    bucket: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    region: str = "us-east-1"
    addressing_style: str = "path"
    prefix: str = ""
    url_expires_s: int = MAX_EXPIRES_S
    public_base_url: str = ""
    acl: str = ""
    part_bytes: int = 16 * _MIB
    threads: int = 4
    attempts: int = 3
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0


@dataclass(frozen=True)
class _Endpoint:
    """An endpoint taken apart: its bucket if it names one, its region if its host does."""

    parts: SplitResult
    host: str
    bucket: str = ""
    region: str = ""


def bucket_config(env: Mapping[str, str]) -> BucketConfig | None:
    """Returns the bucket that environment variables describe, or None if there is no endpoint.

    Args:
        env: names and texts. BUCKET_ENDPOINT_URL or R2_ENDPOINT switches the bucket on.

    Raises:
        InvalidSettings: naming every variable that is wrong.
    """
    return bucket_of(read_settings(env))


def bucket_of(settings: Settings) -> BucketConfig | None:
    """Returns the bucket of the worker, or None if there is no endpoint.

    Raises:
        InvalidSettings: naming every variable that is wrong.
    """
    if not settings.bucket_endpoint_url:
        return None
    faults: list[tuple[str, str]] = []
    endpoint = _take_apart(settings.bucket_endpoint_url, settings.bucket_name, faults)
    prefix = settings.bucket_prefix.strip("/")
    faults += _prefix_faults(prefix)
    faults += _base_url_faults(settings.bucket_public_base_url)
    if settings.bucket_acl and settings.bucket_acl not in _ACLS:
        faults.append(("BUCKET_ACL", f"BUCKET_ACL must be one of {', '.join(_ACLS)}, or unset"))
    if faults or endpoint is None:
        raise InvalidSettings(tuple(text for _, text in faults), field=faults[0][0])
    return BucketConfig(
        endpoint_url=endpoint.parts.geturl(),
        bucket=endpoint.bucket,
        access_key_id=settings.bucket_access_key_id,
        secret_access_key=settings.bucket_secret_access_key,
        session_token=settings.bucket_session_token,
        region=settings.bucket_region or endpoint.region,
        addressing_style=settings.bucket_addressing_style or _style(endpoint),
        prefix=prefix,
        url_expires_s=settings.bucket_url_expires_s,
        public_base_url=settings.bucket_public_base_url.rstrip("/"),
        acl=settings.bucket_acl,
    )


def request_bucket(
    s3_config: Mapping[str, object],
    settings: Settings,
    *,
    resolve: Callable[[str, float], list[str]] = resolve,
) -> BucketConfig:
    """Returns the bucket that a request brings along in `s3Config`.

    Only https, and only public hosts: so even a name that later leads to a private address gets
    no further than the check of the certificate.

    Args:
        s3_config: endpointUrl, accessId, accessSecret and bucketName (optional if the endpoint
            names it).
        settings: the rules for URLs, and prefix and lifetime of links.
        resolve: asks for the addresses of a host.

    Raises:
        InvalidRequest: INVALID_TYPE, URL_INVALID, URL_SCHEME or URL_BLOCKED; MISSING_FIELD where
            there is no bucket.
    """
    names = ("endpointUrl", "accessId", "accessSecret", "bucketName")
    values = {name: _text_of(s3_config, name, needed=name != "bucketName") for name in names}
    url, label = values["endpointUrl"], "s3Config.endpointUrl"
    rules = replace(settings, require_https=True)
    check_url(url, label, rules)
    if not settings.allow_private_urls:
        _check_public(split_url(url, label, rules).host, label, resolve)
    faults: list[tuple[str, str]] = []
    endpoint = _take_apart(url, values["bucketName"], faults)
    if faults or endpoint is None:
        message = (
            "'s3Config' names no bucket, or two; give 'bucketName' and the plain 'endpointUrl'"
        )
        raise InvalidRequest(message, field="s3Config", code="MISSING_FIELD")
    return BucketConfig(
        endpoint_url=endpoint.parts.geturl(),
        bucket=endpoint.bucket,
        access_key_id=values["accessId"],
        secret_access_key=values["accessSecret"],
        region=endpoint.region,
        addressing_style=_style(endpoint),
        prefix=settings.bucket_prefix.strip("/"),
        url_expires_s=settings.bucket_url_expires_s,
    )


def _text_of(s3_config: Mapping[str, object], name: str, *, needed: bool) -> str:
    value = s3_config.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or (needed and not value.strip()):
        where = f"s3Config.{name}"
        raise InvalidRequest(f"'{where}' must be a string", field=where, code="INVALID_TYPE")
    return value.strip()


def _check_public(host: str, label: str, resolve: Callable[[str, float], list[str]]) -> None:
    try:
        addresses = resolve(host, _RESOLVE_S)
    except OSError:
        addresses = []
    if not addresses or not all(map(is_public, addresses)):
        message = f"URL host is not allowed for '{label}'"
        raise InvalidRequest(message, field=label, code="URL_BLOCKED")


def _take_apart(url: str, name: str, faults: list[tuple[str, str]]) -> _Endpoint | None:
    """Returns the endpoint without its bucket, and the bucket; None after adding a fault."""
    found = _split(url)
    if found is None:
        text = (
            "BUCKET_ENDPOINT_URL must be an http or https address of a host, without a user, "
            "query or fragment, for example https://s3.eu-central-1.amazonaws.com"
        )
        faults.append(("BUCKET_ENDPOINT_URL", text))
        return None
    in_host, region = _known_host(found.host)
    if name and found.host.startswith(f"{name.lower()}."):
        in_host = name
    folders = [part for part in found.parts.path.split("/") if part]
    bucket = name or in_host or (folders[0] if len(folders) == 1 else "")
    if fault := _bucket_fault(bucket, in_host, folders):
        faults.append(("BUCKET_NAME", fault))
        return None
    host = found.host.removeprefix(f"{in_host.lower()}.") if in_host else found.host
    if folders[:1] == [bucket]:
        del folders[0]
    port = f":{found.parts.port}" if found.parts.port else ""
    authority = f"[{host}]{port}" if ":" in host else host + port
    path = "".join(f"/{part}" for part in folders)
    parts = SplitResult(found.parts.scheme, authority, path, "", "")
    return _Endpoint(parts, host, bucket, region or _region_of(host))


def _bucket_fault(bucket: str, in_host: str, folders: list[str]) -> str:
    """Returns what is wrong with the bucket that was found, or ""."""
    if not bucket and folders:
        return "the path of BUCKET_ENDPOINT_URL has several parts: set BUCKET_NAME"
    if not bucket:
        return "BUCKET_NAME is not set and BUCKET_ENDPOINT_URL names no bucket: set BUCKET_NAME"
    if in_host and in_host != bucket:
        return f"BUCKET_NAME is {bucket!r} but BUCKET_ENDPOINT_URL names {in_host!r}: unset one"
    if not _BUCKET.fullmatch(bucket):
        return f"the bucket must have 3 to 255 letters, digits, '.', '_' or '-', got {bucket!r}"
    return ""


def _split(url: str) -> _Endpoint | None:
    """Returns scheme, host, port and path of an address; None if it is not a plain one."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return None
    printable = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    plain = not ("@" in parts.netloc or parts.query or parts.fragment)
    usable = parts.scheme in ("http", "https") and host and plain and printable
    return _Endpoint(parts, host.removesuffix(".")) if usable else None


def _known_host(host: str) -> tuple[str, str]:
    """Returns the bucket and the region that the host of a known provider names; "" for none."""
    for pattern in (_AWS, _R2, _SPACES):
        if found := pattern.fullmatch(host):
            named = found.groupdict()
            region = "auto" if pattern is _R2 else named["region"] if pattern is _AWS else ""
            return named["bucket"] or "", region or ""
    return "", ""


def _region_of(host: str) -> str:
    found = _REGION_IN_HOST.search(host)
    return found[1] if found else "us-east-1"


def _style(endpoint: _Endpoint) -> str:
    """Returns "virtual" for AWS, else "path"; a dot in the name would break the certificate."""
    on_aws = _AWS.fullmatch(endpoint.host) is not None
    return "virtual" if on_aws and "." not in endpoint.bucket else "path"


def _prefix_faults(prefix: str) -> list[tuple[str, str]]:
    parts = prefix.split("/") if prefix else []
    bad = any(part in ("", ".", "..") for part in parts) or not prefix.isprintable()
    if bad or "\\" in prefix or len(prefix.encode()) > _MAX_PREFIX_BYTES:
        text = (
            f"BUCKET_PREFIX must be folders separated by single slashes, without '.' and '..', "
            f"at most {_MAX_PREFIX_BYTES} bytes"
        )
        return [("BUCKET_PREFIX", text)]
    return []


def _base_url_faults(url: str) -> list[tuple[str, str]]:
    if url and _split(url) is None:
        text = (
            "BUCKET_PUBLIC_BASE_URL must be an http or https address of a host, without a user, "
            "query or fragment"
        )
        return [("BUCKET_PUBLIC_BASE_URL", text)]
    return []


def public_url(config: BucketConfig, key: str) -> str:
    """Returns the address of a key below the public base URL."""
    return f"{config.public_base_url}/{quote(key)}"
