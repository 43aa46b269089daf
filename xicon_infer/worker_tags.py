"""What a video says of itself: the software and its version, and the settings only if allowed.

A prompt or an address never goes into a file: whoever gets the video would read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av

from xicon_infer import __version__
from xicon_infer.errors import MediaError
from xicon_infer.media.video import probe
from xicon_infer.media.write import atomic_path, write_error
from xicon_infer.types import Result

HIDDEN = ("prompt", "negative_prompt", "output", "models_dir", "image", "end_image", "video")
"""Settings that stay out of a file; so do all others that hold a path."""


def tags(result: Result, *, with_settings: bool) -> dict[str, str]:
    """Returns the tags of a result.

    Args:
        result: what was made.
        with_settings: add seed and settings (XICON_EMBED_PARAMS).
    """
    plain = {"software": f"xicon-infer {__version__}"}
    if not with_settings:
        return plain
    shown = {
        name: value
        for name, value in result.settings.items()
        if name not in HIDDEN
        and not (isinstance(value, str) and "/" in value and "\\" not in value)
    }
    return plain | {"comment": json.dumps({"seed": result.seed, "settings": shown})}


def tag_video(path: Path, values: Mapping[str, str]) -> None:
    """Gives an MP4 file its tags; its pictures and sound stay as they are, byte by byte.

    Raises:
        MediaError: the file cannot be written, or came out with other frames.
    """
    before = probe(path).num_frames
    with atomic_path(path) as temporary:
        try:
            _copy(path, temporary, dict(values))
        except av.FFmpegError as error:
            raise write_error(error, path, "output") from error
        if probe(temporary).num_frames != before:
            raise MediaError("'output': the tagged file came out wrong", field="output")


def _copy(source: Path, target: Path, values: Mapping[str, Any]) -> None:
    # As in `media.container`: nothing but a plain file is opened.
    only_files = {"protocol_whitelist": "file"}
    flags = {"movflags": "+faststart+use_metadata_tags"}
    with (
        av.open(str(source), options=only_files) as given,
        av.open(str(target), "w", format="mp4", options=flags) as made,
    ):
        made.metadata.update(values)
        streams = {
            stream.index: made.add_stream_from_template(stream)
            for stream in given.streams
            if stream.type in ("video", "audio")
        }
        for packet in given.demux([given.streams[index] for index in streams]):
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
