"""What the tests of fetching share: small pictures, and a fetch with everything faked."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from xicon_infer.media.fetch import fetch
from xicon_infer.media.fetch_types import FetchLimits, MediaSource
from xicon_infer.types import SilentProgress


def picture(kind="PNG", side=24):
    """Returns the bytes of a small picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNG = picture()


def get(world, folder, url, *, limits=None, role="image", field="image", progress=None):
    """Fetches one URL over the network of a `World`."""
    return fetch(
        MediaSource("url", url),
        role,
        field,
        folder,
        limits or FetchLimits(),
        progress=progress or SilentProgress(),
        network=world.network(),
    )


def take(folder, kind, value, *, limits=None, role="image", field="image", world=None):
    """Takes base64 text or a path; has no network."""
    from tests.media.hostile_server import World

    return fetch(
        MediaSource(kind, value),
        role,
        field,
        folder,
        limits or FetchLimits(input_roots=None),
        progress=SilentProgress(),
        network=(world or World(None)).network(),
    )
