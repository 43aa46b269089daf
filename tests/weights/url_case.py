"""One file on the synthetic server, and fetching it as `download` does."""

from __future__ import annotations

import pytest

from tests.weights.hub_server import Fault, digest
from xicon_infer.errors import WeightsError
from xicon_infer.weights.download_http import Stop
from xicon_infer.weights.download_url import Source, fetch, kept_bytes

BODY = bytes(range(256)) * 400  # 102,400 bytes
OTHER = BODY[::-1]
PATH = "/web/file.bin"


def source(server, **changes):
    """Returns the file as its server and a manifest describe it."""
    options = {
        "url": f"{server.url}{PATH}",
        "size_bytes": len(BODY),
        "sha256": digest(BODY),
        "etag": server.web["file.bin"].etag,
    }
    return Source(**{**options, **changes})


def get(server, wanted, target, *, stop=None, check=lambda path: None, gained=None, **transfer):
    return fetch(
        wanted,
        target,
        transfer=server.transfer(**transfer),
        stop=stop or Stop(),
        arrived=target.is_file,
        check=check,
        gained=gained or (lambda n: None),
    )


def refusal(server, wanted, target, **options):
    with pytest.raises(WeightsError) as caught:
        get(server, wanted, target, **options)
    assert not target.exists()
    return caught.value


def parts(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".part")


def interrupt(server, wanted, target, after=40_000):
    """Leaves a part, as a run does whose connection broke."""
    server.faults[PATH] = [Fault(close_after=after)]
    refusal(server, wanted, target, backoff_s=())
    assert kept_bytes(wanted, target) == after
    server.sent.clear()
    server.asked.clear()
