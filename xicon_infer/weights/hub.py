"""What is published about a model file: version, size and hash, without fetching it.

The hub is asked through huggingface_hub, whose conventions hold: HF_TOKEN and `hf auth login`,
HF_ENDPOINT, HF_HUB_OFFLINE. An entry with an address of its own is asked with a HEAD request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xicon_infer import __version__
from xicon_infer.errors import WeightsError
from xicon_infer.weights.download_http import (
    Broken,
    Status,
    Stop,
    Transfer,
    open_url,
    retry,
    retry_after_s,
    status_reason,
    without_query,
)
from xicon_infer.weights.download_url import validator_of

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

    from xicon_infer.weights.manifest import FileEntry

_SHA256 = re.compile(r"[0-9a-f]{64}")
_USER_AGENT = {"User-Agent": f"xicon-infer/{__version__}"}
_NO_HEAD = (403, 405, 501)
"""Answers of servers that know GET alone, or sign their addresses for it alone."""


class Unreachable(WeightsError):
    """Nobody could be asked: there is no network, or it must not be used."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as it is published now.

    url: its address; on the hub that of this very version. revision: the commit on the hub, else
    None. size_bytes: None if the server does not say. sha256: None if the server does not say, as
    for small files on the hub. etag: names the version; "" if nothing does. headers: to send with
    a request for it.
    """

    url: str
    revision: str | None
    size_bytes: int | None
    sha256: str | None
    etag: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def is_offline() -> bool:
    """Returns whether the environment forbids the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def remote_file(
    entry: FileEntry, *, transfer: Transfer | None = None, stop: Stop | None = None
) -> RemoteFile:
    """Returns what is published for an entry: at its pinned revision, else the newest.

    Args:
        entry: the file.
        transfer: time limits, attempts and the hub's address; the defaults if None.
        stop: ends waiting.

    Raises:
        WeightsError: it is not there, needs a licence to be accepted or a token; `Unreachable` if
            the server cannot be reached.
        Cancelled: `stop` is set.
    """
    transfer = transfer or Transfer()
    stop = stop or Stop()
    if is_offline():
        raise Unreachable(
            f"{entry.id}: HF_HUB_OFFLINE is set, nobody is asked. Unset it, or copy the file."
        )
    ask = _ask_address if entry.url else _ask_hub
    try:
        return retry(lambda: ask(entry, transfer, stop), transfer=transfer, stop=stop)
    except Broken as error:
        place = without_query(entry.url) if entry.url else f"the hub for {entry.repo}"
        raise Unreachable(
            f"{entry.id}: {error}, when asking {place} ({len(transfer.backoff_s) + 1} attempts). "
            "Check the connection and try again."
        ) from error


def _ask_address(entry: FileEntry, transfer: Transfer, stop: Stop) -> RemoteFile:
    headers = {**_USER_AGENT, "Accept-Encoding": "identity"}
    try:
        answer = open_url(entry.url, headers, method="HEAD", transfer=transfer, stop=stop)
    except Status as error:
        if error.code in _NO_HEAD:
            return RemoteFile(entry.url, None, None, None, "", _USER_AGENT)
        raise WeightsError(
            f"{entry.id}: {without_query(entry.url)}: {status_reason(error.code)}"
        ) from error
    answer.close()
    length = answer.headers.get("Content-Length", "")
    plain = answer.headers.get("Content-Encoding", "identity") == "identity"
    return RemoteFile(
        url=entry.url,
        revision=None,
        size_bytes=int(length) if length.isdigit() and plain else None,
        sha256=None,
        etag=validator_of(answer.headers),
        headers=_USER_AGENT,
    )


def _ask_hub(entry: FileEntry, transfer: Transfer, stop: Stop) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    stop.check()
    try:
        address = hf_hub_url(
            entry.repo, entry.path, revision=entry.revision, endpoint=transfer.endpoint
        )
    except ValueError as error:  # no repository can have such a name
        raise WeightsError(f"{entry.id}: {error} Correct the manifest.") from error
    found = _metadata(entry, address, transfer)
    stop.check()
    if not found.commit_hash or not found.etag:
        raise WeightsError(
            f"{entry.id}: {without_query(address)} is not answered by a Hugging Face hub. Check "
            "HF_ENDPOINT and the proxy."
        )
    return RemoteFile(
        url=hf_hub_url(
            entry.repo, entry.path, revision=found.commit_hash, endpoint=transfer.endpoint
        ),
        revision=found.commit_hash,
        size_bytes=found.size,
        sha256=found.etag if _SHA256.fullmatch(found.etag) else None,
        etag=found.etag,
        headers={**_USER_AGENT, **_authorization()},
    )


def _authorization() -> dict[str, str]:
    """Returns the header with the user's token, where there is one and it may be sent unasked."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _metadata(entry: FileEntry, address: str, transfer: Transfer) -> HfFileMetadata:
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    # Its first base is the root of all errors of the HTTP client that this version uses.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        return get_hf_file_metadata(
            address,
            timeout=transfer.timeout_s,
            library_name="xicon-infer",
            library_version=__version__,
            endpoint=transfer.endpoint,
        )
    except (client_error, OSError) as error:
        raise _hub_error(entry, address, error) from error


def _hub_error(entry: FileEntry, address: str, error: BaseException) -> Exception:
    """Returns what an error of huggingface_hub means for the user."""
    from huggingface_hub import errors

    place = f"{entry.id}: {entry.path} in {entry.repo}"
    login = "Run `hf auth login` or set HF_TOKEN, and pull again."
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", 0)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return WeightsError(f"{place}: HF_HUB_OFFLINE is set. Unset it, or copy the file.")
    if isinstance(error, errors.GatedRepoError):
        return WeightsError(
            f"{place} is gated. Accept its licence at {address.split('/resolve/')[0]}. {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(
            f"{place} has no revision {entry.revision}. Lock the weights again, or ask for main."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return WeightsError(
            f"{place} was not found at revision {entry.revision or 'main'}. Look for a newer list "
            "of weights."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return WeightsError(f"{place}: no such repository, or a private one. {login}")
    if code in (401, 403):
        return WeightsError(f"{place}: the access token is refused ({code}). {login}")
    if 400 <= code < 500 and code not in (408, 425, 429):
        return WeightsError(f"{place}: {status_reason(code)}")
    if response is not None:
        return Broken(f"the hub answered {code}", retry_after_s(response.headers))
    return Broken(f"the hub cannot be reached ({type(error).__name__})")
