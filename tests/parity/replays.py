"""The list of every replay, in the order in which a file is offered to them."""

from __future__ import annotations

from tests.parity import (
    dit,
    encoders,
    media,
    pose,
    pose_align,
    pose_detect,
    sampling,
    serving,
    side_files,
    steady_dancer,
    steady_dancer_pose,
    vae,
    weights,
)
from tests.parity.golden import Replay

REPLAYS: tuple[Replay, ...] = (
    *dit.REPLAYS,
    *sampling.REPLAYS,
    *vae.REPLAYS,
    *encoders.REPLAYS,
    *weights.REPLAYS,
    *media.REPLAYS,
    *pose.REPLAYS,
    *pose_align.REPLAYS,
    *pose_detect.REPLAYS,
    *steady_dancer.REPLAYS,
    *steady_dancer_pose.REPLAYS,
    *serving.REPLAYS,
    *side_files.REPLAYS,
)
