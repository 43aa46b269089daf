"""Motion of the SMPL-24 skeleton: invented dances, and excerpts of the real one.

An invented motion is a kinematic tree whose joint angles are sums of sinusoids inside the limits of
the joint. A real motion is the direction of every bone of the example track, on the bones of the
character. Both stand on the ground y = 0 around the origin; `world` places them before the camera.

Shape letters: F frames, J = 24 joints. Lengths are millimetres (x right, y down, z forward, so a
figure that looks at the camera looks along -z and has its left hand at +x); angles are radians.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.track import load_tracks

Float64Array = npt.NDArray[np.float64]
Split = Literal["train", "test"]

FPS = 16
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
MIRRORED = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
"""The joint on the other side of the body, by joint."""

# Joint from its parent, standing with the arms down; lengths are those of the example track.
REST_MM: Float64Array = np.array(
    [
        (0, 0, 0),
        (86, 22, 0),
        (-86, 22, 0),
        (0, -109, 0),
        (4, 398, 0),
        (-4, 398, 0),
        (0, -109, 0),
        (0, 426, 0),
        (0, 426, 0),
        (0, -109, 0),
        (6, 62, -135),
        (-6, 62, -135),
        (0, -166, 0),
        (64, -106, 0),
        (-64, -106, 0),
        (0, -112, -14),
        (112, -2, 0),
        (-112, -2, 0),
        (0, 231, 0),
        (0, 231, 0),
        (0, 217, 0),
        (0, 217, 0),
        (0, 62, 0),
        (0, 62, 0),
    ],
    np.float64,
)

DANCE = Path(__file__).parents[2] / "examples" / "dance_fullbody.npz"
# First and last frame that a split may use; those between belong to neither.
_DANCE_FRAMES: dict[Split, tuple[int, int]] = {"train": (0, 150), "test": (152, 211)}
_DANCE_FPS = 24

# Lowest and highest angle of each joint; positive is forward or outward as a person would say it.
_LIMITS: dict[str, tuple[float, float]] = {
    "lean": (-0.2, 0.45),
    "bend": (-0.35, 0.35),
    "twist": (-0.4, 0.4),
    "nod": (-0.25, 0.3),
    "tilt": (-0.3, 0.3),
    "look": (-0.6, 0.6),
    "arm_out": (0.12, 2.7),
    "arm_forward": (-0.5, 1.3),
    "arm_turn": (-0.7, 1.2),
    "elbow": (0.1, 2.2),
    "leg_out": (0.02, 0.4),
    "leg_forward": (-0.3, 0.9),
    "knee": (0.05, 1.3),
}


def rest_pose(bones: Float64Array) -> Float64Array:
    """Returns [J, 3], upright, facing the camera, arms a little away from the body.

    Args:
        bones: [J, 3], each joint from its parent, millimetres.
    """
    angles = {name: np.zeros(1) for name in ("lean", "bend", "twist", "nod", "tilt", "look", "yaw")}
    for side in ("left", "right"):
        limb = {"arm_out": 0.45, "elbow": 0.2, "leg_out": 0.07}
        for name in (
            "arm_out",
            "arm_forward",
            "arm_turn",
            "elbow",
            "leg_out",
            "leg_forward",
            "knee",
        ):
            angles[f"{side}_{name}"] = np.full(1, limb.get(name, 0.0))
    return _grounded(_pose(bones, angles))[0]


def invent_motion(rng: np.random.Generator, bones: Float64Array, num_frames: int) -> Float64Array:
    """Returns a smooth invented dance, [F, J, 3].

    Args:
        rng: decides everything.
        bones: [J, 3], each joint from its parent.
        num_frames: F, at `FPS`.
    """
    seconds = np.arange(num_frames) / FPS
    tempo = rng.uniform(0.35, 1.1)
    energy = rng.uniform(0.35, 1.0)
    angles = {
        name: _swing(rng, name, seconds, tempo, energy)
        for name in ("lean", "bend", "twist", "nod", "tilt", "look")
    }
    angles["yaw"] = _turning(rng, seconds, num_frames)
    _move_arms(rng, angles, seconds, tempo, energy)
    _move_legs(rng, angles, seconds, tempo)
    joints = _grounded(_pose(bones, angles))
    sway = rng.uniform(0, 160) * _wave(rng, seconds, tempo / 2)
    depth = rng.uniform(0, 120) * _wave(rng, seconds, tempo / 2)
    hop = np.zeros(num_frames)
    if rng.random() < 0.25:
        hop = -rng.uniform(40, 160) * np.abs(np.sin(np.pi * tempo * seconds + rng.uniform(0, 3)))
    return joints + np.stack([sway, hop, depth], axis=1)[:, None]


def excerpt_dance(
    rng: np.random.Generator, bones: Float64Array, num_frames: int, split: Split
) -> Float64Array:
    """Returns an excerpt of the real dance on other bones, [F, J, 3].

    It is mirrored, played faster or slower, and seen from another side, at random. A long excerpt
    runs back and forth within the frames of its split.

    Args:
        rng: decides everything.
        bones: [J, 3], each joint from its parent.
        num_frames: F, at `FPS`.
        split: "train" sees the beginning of the track only, "test" its end.
    """
    joints = _between(_dance_joints(), dance_moments(rng, num_frames, split))
    if rng.random() < 0.5:
        joints = joints[:, MIRRORED] * np.array([-1.0, 1.0, 1.0])
    angle = rng.uniform(-0.6, 0.6)
    joints = joints @ _turn(1, np.full(1, angle))[0].T
    return _on_bones(joints, bones)


def dance_moments(rng: np.random.Generator, num_frames: int, split: Split) -> Float64Array:
    """Returns the moments of the example track that an excerpt shows, frame numbers [F]."""
    first, last = _DANCE_FRAMES[split]
    pace = _DANCE_FPS / FPS * rng.uniform(0.6, 1.2)
    length = last - first
    start = rng.uniform(0, max(length - pace * (num_frames - 1), length * 0.25))
    # A triangle wave turns round at either end.
    return first + length - np.abs((start + pace * np.arange(num_frames)) % (2 * length) - length)


def _move_arms(
    rng: np.random.Generator,
    angles: dict[str, Float64Array],
    seconds: Float64Array,
    tempo: float,
    energy: float,
) -> None:
    """Adds both arms: alone, together, or one as the other half a beat later."""
    names = ("arm_out", "arm_forward", "arm_turn", "elbow")
    manner = rng.choice(["free", "together", "later"], p=[0.5, 0.25, 0.25])
    delay = 0.5 / tempo if manner == "later" else 0.0
    for name in names:
        state = rng.bit_generator.state
        angles[f"left_{name}"] = _swing(rng, name, seconds, tempo, energy)
        if manner != "free":
            # The same draws again, so that the right arm repeats the left one.
            rng.bit_generator.state = state
        angles[f"right_{name}"] = _swing(rng, name, seconds + delay, tempo, energy)


def _move_legs(
    rng: np.random.Generator, angles: dict[str, Float64Array], seconds: Float64Array, tempo: float
) -> None:
    """Adds both legs: a stance, bending of both knees, and steps in turn."""
    crouch = rng.uniform(0, 0.55) * (0.5 + 0.5 * _wave(rng, seconds, tempo))
    step = rng.uniform(0.2, 0.8) if rng.random() < 0.6 else 0.0
    phase = 2 * np.pi * (tempo * seconds + rng.random())
    for side, sign in (("left", 1.0), ("right", -1.0)):
        lift = step * np.clip(sign * np.sin(phase), 0, None) ** 1.5
        low, high = _LIMITS["leg_out"]
        angles[f"{side}_leg_out"] = np.full(len(seconds), rng.uniform(low, high)) * 0.8
        forward = np.clip(crouch + lift, *_LIMITS["leg_forward"])
        angles[f"{side}_leg_forward"] = forward
        angles[f"{side}_knee"] = np.clip(1.7 * crouch + 1.6 * lift + 0.05, *_LIMITS["knee"])


def _turning(rng: np.random.Generator, seconds: Float64Array, num_frames: int) -> Float64Array:
    """Returns the yaw: somewhere within 60 degrees, swaying; at times one full turn."""
    yaw = rng.uniform(-0.7, 0.7) + rng.uniform(0, 0.35) * _wave(rng, seconds, 0.4)
    if rng.random() < 0.15:
        share = np.linspace(0, 1, num_frames)
        yaw = yaw + rng.choice([-1, 1]) * 2 * np.pi * share**2 * (3 - 2 * share)
    return yaw


def _swing(
    rng: np.random.Generator, name: str, seconds: Float64Array, tempo: float, energy: float
) -> Float64Array:
    """Returns one joint angle that swings between two values inside its limits, [F]."""
    low, high = _LIMITS[name]
    reach = (high - low) * energy * rng.uniform(0.4, 1.0)
    bottom = rng.uniform(low, high - reach)
    return bottom + reach * (0.5 + 0.5 * _wave(rng, seconds, tempo))


def _wave(rng: np.random.Generator, seconds: Float64Array, tempo: float) -> Float64Array:
    """Returns a sum of sinusoids at half, whole and double tempo, within -1 and 1, [F]."""
    weights = rng.uniform(0.2, 1.0, 3) * np.array([0.6, 1.0, 0.3])
    phases = rng.uniform(0, 2 * np.pi, 3)
    angles = 2 * np.pi * tempo * np.outer(seconds, [0.5, 1.0, 2.0]) + phases
    return np.sin(angles) @ (weights / weights.sum())


def _pose(bones: Float64Array, angles: dict[str, Float64Array]) -> Float64Array:
    """Returns joints [F, J, 3] with the pelvis at the origin."""
    spine = (
        _turn(1, angles["twist"] / 3) @ _turn(2, angles["bend"] / 3) @ _turn(0, angles["lean"] / 3)
    )
    local: dict[int, Float64Array] = {
        0: _turn(1, angles["yaw"]),
        3: spine,
        6: spine,
        9: spine,
        12: _turn(1, angles["look"]) @ _turn(2, angles["tilt"]) @ _turn(0, angles["nod"]),
    }
    # Left is +x, and a positive turn about z carries what hangs down to -x.
    for side, sign, joints in (("left", -1.0, (16, 18, 1, 4)), ("right", 1.0, (17, 19, 2, 5))):
        get = {name: angles[f"{side}_{name}"] for name in _LIMITS if f"{side}_{name}" in angles}
        shoulder, elbow, hip, knee = joints
        local[shoulder] = (
            _turn(2, sign * get["arm_out"])
            @ _turn(0, -get["arm_forward"])
            @ _turn(1, -sign * get["arm_turn"])
        )
        local[elbow] = _turn(0, -get["elbow"])
        local[hip] = _turn(2, sign * get["leg_out"]) @ _turn(0, -get["leg_forward"])
        local[knee] = _turn(0, get["knee"])
        # The sole stays level however the leg is bent.
        local[knee + 3] = _turn(0, get["leg_forward"] - get["knee"])
    frames = len(angles["yaw"])
    joints_mm = np.zeros((frames, len(bones), 3))
    whole: list[Float64Array] = []
    for joint, parent in enumerate(PARENTS):
        above = whole[parent] if parent >= 0 else np.broadcast_to(np.eye(3), (frames, 3, 3))
        if parent >= 0:
            joints_mm[:, joint] = joints_mm[:, parent] + above @ bones[joint]
        whole.append(above @ local[joint] if joint in local else above)
    return joints_mm


def _grounded(joints: Float64Array) -> Float64Array:
    """Returns the joints with the lowest foot of every frame on y = 0."""
    lowest = joints[:, [7, 8, 10, 11], 1].max(axis=1)
    return joints - np.stack([0 * lowest, lowest, 0 * lowest], axis=1)[:, None]


def _turn(axis: int, angle: Float64Array) -> Float64Array:
    """Returns rotations [F, 3, 3] about x, y or z (0, 1, 2)."""
    first, second = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, axis, axis] = 1
    matrix[:, first, first] = matrix[:, second, second] = np.cos(angle)
    matrix[:, second, first] = np.sin(angle)
    matrix[:, first, second] = -np.sin(angle)
    return matrix


@lru_cache(maxsize=1)
def _dance_joints() -> Float64Array:
    """Returns the example track, smoothed against jitter, [F, J, 3]."""
    joints = load_tracks(DANCE)[0].body.joints.astype(np.float64)
    padded = np.concatenate([joints[:1], joints, joints[-1:]])
    smooth: Float64Array = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return smooth


def _between(joints: Float64Array, moment: Float64Array) -> Float64Array:
    """Returns the joints at fractional frame numbers `moment` [F]."""
    low = np.clip(np.floor(moment).astype(np.int64), 0, len(joints) - 2)
    share = (moment - low)[:, None, None]
    return joints[low] * (1 - share) + joints[low + 1] * share


def _on_bones(joints: Float64Array, bones: Float64Array) -> Float64Array:
    """Returns the pose of `joints` [F, J, 3] with the bone lengths of `bones`, on the ground.

    The pelvis travels as far as before in proportion to the legs.
    """
    moved = np.zeros_like(joints)
    legs = (
        np.linalg.norm(bones[[4, 7]], axis=1).sum() / np.linalg.norm(REST_MM[[4, 7]], axis=1).sum()
    )
    moved[:, 0] = (joints[:, 0] - joints[:, 0].mean(axis=0)) * legs
    for joint, parent in enumerate(PARENTS[1:], start=1):
        bone = joints[:, joint] - joints[:, parent]
        length = np.linalg.norm(bones[joint])
        bone = bone * (length / np.maximum(np.linalg.norm(bone, axis=1, keepdims=True), 1e-6))
        moved[:, joint] = moved[:, parent] + bone
    lowest = moved[:, [7, 8, 10, 11], 1].max(axis=1)
    # A hop leaves the ground; the feet of most frames stand on it.
    moved[..., 1] -= np.percentile(lowest, 70)
    return moved
