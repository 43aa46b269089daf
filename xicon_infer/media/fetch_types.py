"""What goes into a fetch and what comes out: sources, limits, results. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xicon_infer.media.source import MediaLimits

Role = Literal["image", "video"]
Kind = Literal["url", "base64", "path"]

_MEDIA = MediaLimits(max_side_px=4096)


@dataclass(frozen=True)
class MediaSource:
    """Where a file comes from: an address, its bytes as text, or a path on this machine."""

    kind: Kind
    value: str


@dataclass(frozen=True)
class Wanted:
    """One file to fetch: its source, what it must be, and the request field that named it."""

    source: MediaSource
    role: Role
    field: str


@dataclass(frozen=True)
class FetchLimits:
    """What a fetch may do and cost.

    media: sizes, pixels, length. connect_s: of one address, the TLS handshake included. gap_s:
    longest wait for the next byte. image_s, video_s: of one file, all tries and redirects
    included. retry_waits_s: seconds before the second try and those after it; their number
    bounds the tries. reserve_bytes: free space that must be left on the disk. probe_s,
    probe_bytes: time and memory that looking into a video may take. input_roots: folders that
    paths must lie in; None for any. The names of the last five are those of the settings that
    `address.check_url` reads.
    """

    media: MediaLimits = _MEDIA
    dns_s: float = 5.0
    connect_s: float = 10.0
    gap_s: float = 20.0
    image_s: float = 60.0
    video_s: float = 300.0
    retry_waits_s: tuple[float, ...] = (1.0, 3.0)
    max_retry_after_s: float = 10.0
    max_redirects: int = 5
    reserve_bytes: int = 2_000_000_000
    probe_s: float = 60.0
    probe_bytes: int = 1536 * 1024**2
    input_roots: tuple[Path, ...] | None = (Path("/runpod-volume"),)
    allowed_ports: tuple[int, ...] = (80, 443, 8080, 8443)
    url_allowlist: tuple[str, ...] = ()
    require_https: bool = False
    allow_private_urls: bool = False

    def max_bytes(self, role: Role) -> int:
        """Returns the largest size of a file of that role."""
        return self.media.max_image_bytes if role == "image" else self.media.max_video_bytes

    def total_s(self, role: Role) -> float:
        """Returns the seconds that a file of that role may take."""
        return self.image_s if role == "image" else self.video_s


@dataclass(frozen=True)
class Fetched:
    """A file that is there, looked into, and named by its content.

    bytes: its size. kind: as `source.sniff`, for example "PNG". sha256: 64 hexadecimal digits.
    seconds: from the start to the end. tries: requests made, redirects not counted; 1 for text
    and paths.
    """

    path: Path
    bytes: int
    kind: str
    sha256: str
    seconds: float
    tries: int
