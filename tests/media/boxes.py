"""MP4 files built box by box, for headers that no encoder writes."""

from __future__ import annotations

import struct
import zlib

_MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full(kind, *parts, flags=0):
    return box(kind, struct.pack(">I", flags), *parts)


_THIS_FILE = full(b"url ", flags=1)


def png_header(width, height):
    """Returns a PNG of a few bytes that claims any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b""))
    )


def mp4(
    *,
    samples=1,
    width=64,
    height=64,
    duration_ms=1000,
    edits=0,
    fragment_samples=0,
    data_reference=_THIS_FILE,
    sample=b"\0",
    codec=b"png ",
    tracks=1,
):
    """Returns a film of `samples` times the same frame; every number is taken as it is."""
    ftyp = box(b"ftyp", b"isom\0\0\2\0isomiso2mp41")
    mdat = box(b"mdat", sample, bytes(100))
    listed = 0 if fragment_samples else samples
    entry = box(
        codec,
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", width, height),
        struct.pack(">IIIH", 0x480000, 0x480000, 0, 1) + bytes(32) + struct.pack(">Hh", 24, -1),
    )
    table = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1), entry),
        full(b"stts", struct.pack(">III", 1, listed, 1)),
        full(b"stsc", struct.pack(">IIII", 1, 1, max(listed, 1), 1)),
        full(b"stsz", struct.pack(">II", 0 if fragment_samples else len(sample), listed)),
        full(b"stco", struct.pack(">II", 1, len(ftyp) + 8)),
    )
    references = full(b"dref", struct.pack(">I", 1), data_reference)
    media = box(
        b"mdia",
        full(b"mdhd", struct.pack(">IIIIHH", 0, 0, 1000, duration_ms, 0, 0)),
        full(b"hdlr", bytes(4) + b"vide" + bytes(12) + b"x\0"),
        box(b"minf", full(b"vmhd", bytes(8), flags=1), box(b"dinf", references), table),
    )
    track_head = struct.pack(">IIIII", 0, 0, 1, 0, duration_ms) + bytes(16) + _MATRIX
    track_head += struct.pack(">II", width << 16, height << 16)
    edit = struct.pack(">IiHH", duration_ms, 0, 1, 0) * edits
    edit_list = box(b"edts", full(b"elst", struct.pack(">I", edits), edit)) if edits else b""
    track = box(b"trak", full(b"tkhd", track_head, flags=3), edit_list, media)
    movie_head = struct.pack(">IIIIIH", 0, 0, 1000, duration_ms, 0x10000, 0x100)
    movie_head += bytes(10) + _MATRIX + bytes(24) + struct.pack(">I", 2)
    extends = full(b"trex", struct.pack(">IIIII", 1, 1, 1, 1, 0))
    more = box(b"mvex", extends) if fragment_samples else b""
    film = ftyp + mdat + box(b"moov", full(b"mvhd", movie_head), track * tracks, more)
    if fragment_samples:
        run = full(b"trun", struct.pack(">I", fragment_samples))
        head = full(b"tfhd", struct.pack(">I", 1), flags=0x20000)
        head_box = full(b"mfhd", struct.pack(">I", 1))
        film += box(b"moof", head_box, box(b"traf", head, full(b"tfdt", bytes(4)), run))
    return film
