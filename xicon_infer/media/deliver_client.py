"""A client of an S3-compatible bucket, and what its errors mean in plain words.

boto3 is imported here, inside functions: a worker without a bucket needs none.

Source: boto/boto3: session; boto/botocore: config; amd/gaia: pull 3029 (checksums and R2)
"""

from __future__ import annotations

import http.client
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from xicon_infer.media.deliver_bucket import BucketConfig

_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3")
_SAFE_CODE = re.compile(r"[^A-Za-z0-9]")


def describe(error: BaseException) -> str:
    """Returns why a request failed, without address, key or anything else that it carried."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        code = _SAFE_CODE.sub("", str(answer.get("Error", {}).get("Code", "")))[:64]
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "?")
        said = "" if code in ("", str(status)) else f" {code}"
        return f"the storage answered {status}{said}"
    if isinstance(error, ImportError):
        return "boto3 is not installed (pip install 'xicon-infer[serve]')"
    name = type(error).__name__
    if isinstance(error, KeyError) or name == "ResponseParserError":
        return "what answers at the endpoint is no S3 storage"
    if "Timeout" in name:
        return "the storage does not answer in time"
    if isinstance(error, OSError) and error.strerror:
        return f"{name}, {error.strerror}"
    return f"no connection to the storage ({name})" if "Connect" in name else name


def faults() -> tuple[type[Exception], ...]:
    """Returns the types of error that say: this upload failed. Everything else is a bug."""
    plain = (OSError, ValueError, KeyError, ImportError, http.client.HTTPException)
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
    except ImportError:
        return plain
    return (*plain, BotoCoreError, ClientError, ResponseParserError)


@contextmanager
def open_client(config: BucketConfig) -> Iterator[Any]:
    """Yields a client whose connections end with the block.

    Not kept from job to job: a worker may be frozen in between, and its connections die then.
    """
    from botocore.config import Config

    for name in _CHATTY:  # at level DEBUG they log signatures and signed links
        chatty = logging.getLogger(name)
        if chatty.getEffectiveLevel() < logging.INFO:
            chatty.setLevel(logging.INFO)
    options = Config(
        signature_version="s3v4",
        s3={"addressing_style": config.addressing_style},
        retries={"mode": "standard", "total_max_attempts": config.attempts},
        connect_timeout=config.connect_timeout_s,
        read_timeout=config.read_timeout_s,
        # The trailing checksum that boto3 sends by default since 1.36 breaks R2 and others.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = _session().client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        aws_access_key_id=config.access_key_id,
        aws_secret_access_key=config.secret_access_key,
        aws_session_token=config.session_token or None,
        config=options,
    )
    client.meta.events.register("before-send.s3", _without_keeping)
    try:
        yield client
    finally:
        client.close()


def _without_keeping(request: Any, **_: Any) -> None:
    """Asks for the connection to end with the answer.

    Closing a client leaves its idle connections open until garbage is collected, and a new one
    per part of 16 MB costs nothing.
    """
    request.headers["Connection"] = "close"


@cache
def _session() -> Any:
    """Returns boto3's table of services, which takes longer to read than an upload to begin."""
    from boto3.session import Session

    return Session()
