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
    steady_dancer_sampling,
    vae,
    weights,
)
from tests.parity.golden import Replay
from tests.parity.target import Part

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

NETWORKS: dict[Replay, Part] = {
    dit.replay_wan: "transformer",
    dit.replay_scail: "transformer",
    dit.replay_scail_windows: "transformer",
    dit.replay_scail_sampling: "sampling",
    steady_dancer.replay_forward: "transformer",
    steady_dancer.replay_wrapper: "transformer",
    steady_dancer_sampling.replay_sampling: "sampling",
    vae.replay_vae: "vae",
    vae.replay_tiled: "vae",
    encoders.replay_text_encoder: "encoder",
    encoders.replay_image_encoder: "encoder",
}
"""Replays of networks, which run on another device or in another precision, by kind."""
