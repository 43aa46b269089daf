"""Index and colour tables of every skeleton that the pose stage knows. Data only.

Four numberings meet here: SMPL-24 (3-D joints), OpenPose-18 (what is drawn), COCO-WholeBody-133
(2-D keypoints) and the 21-point hand. Right and left are the person's own. Colours are RGB, 0 to
255. The order of `LIMBS` matters: where two capsules touch, the earlier one is seen.

Source: zai-org/SCAIL-Pose: NLFPoseExtract/nlf_render.py, pose_draw/draw_utils.py;
rookiestar28/ComfyUI-SCAIL-Pose2: NLFPoseExtract/nlf_render.py, vitpose_utils/utils.py.
"""

from __future__ import annotations

from typing import Literal

Rgb = tuple[int, int, int]
Palette = Literal["single", "saturated", "pale"]

SMPL_JOINTS = 24
SMPL_PELVIS = 0
SMPL_HEAD = 15
SMPL_LEFT_WRIST = 20
SMPL_RIGHT_WRIST = 21

OPENPOSE_JOINTS = 18

# The SMPL joint in each OpenPose-18 slot: nose (SMPL has only "head"), neck, right arm, left arm,
# right leg, left leg. Slots 14 to 17 (eyes and ears) have no SMPL joint.
SMPL_OF_OPENPOSE: tuple[int, ...] = (15, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7)

# The 13 capsules of a body, as OpenPose-18 pairs.
LIMBS: tuple[tuple[int, int], ...] = (
    (1, 2),
    (2, 3),
    (3, 4),
    (1, 5),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
)

# One colour per capsule. "single" is for one person; "saturated" and "pale" tell two apart.
PALETTES: dict[Palette, tuple[Rgb, ...]] = {
    "single": (
        (255, 0, 0),
        (255, 85, 0),
        (255, 170, 0),
        (0, 255, 255),
        (0, 170, 255),
        (0, 85, 255),
        (180, 255, 0),
        (0, 255, 0),
        (0, 255, 85),
        (0, 0, 255),
        (85, 0, 255),
        (170, 0, 255),
        (150, 150, 150),
    ),
    "saturated": (
        (255, 20, 20),
        (255, 60, 0),
        (255, 110, 0),
        (0, 230, 255),
        (0, 130, 255),
        (0, 70, 255),
        (160, 255, 40),
        (0, 255, 50),
        (0, 255, 100),
        (0, 0, 255),
        (80, 0, 255),
        (160, 0, 255),
        (130, 130, 130),
    ),
    "pale": (
        (255, 150, 150),
        (255, 180, 140),
        (255, 215, 150),
        (180, 230, 240),
        (160, 200, 255),
        (100, 120, 255),
        (200, 255, 100),
        (100, 255, 100),
        (140, 255, 180),
        (120, 140, 255),
        (180, 90, 255),
        (190, 120, 255),
        (210, 210, 210),
    ),
}

# The flat 18-joint skeleton: 17 sticks, and one colour per stick and per joint of that number.
STICKS: tuple[tuple[int, int], ...] = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
)
STICK_COLORS: tuple[Rgb, ...] = (
    (255, 0, 0),
    (255, 85, 0),
    (255, 170, 0),
    (255, 255, 0),
    (170, 255, 0),
    (85, 255, 0),
    (0, 255, 0),
    (0, 255, 85),
    (0, 255, 170),
    (0, 255, 255),
    (0, 170, 255),
    (0, 85, 255),
    (0, 0, 255),
    (85, 0, 255),
    (170, 0, 255),
    (255, 0, 255),
    (255, 0, 170),
    (255, 0, 85),
)
# Nose to eyes to ears: the part of the flat skeleton that is laid over the capsules.
HEAD_STICKS: tuple[int, ...] = (13, 14, 15, 16)
HEAD_JOINTS: tuple[int, ...] = (0, 14, 15, 16, 17)

HAND_POINTS = 21
HAND_EDGES: tuple[tuple[int, int], ...] = tuple(
    (0 if knuckle == 0 else 4 * finger + knuckle, 4 * finger + knuckle + 1)
    for finger in range(5)
    for knuckle in range(4)
)
# Twenty even steps round the hue circle in float32, truncated to integers (hence 50, not 51).
HAND_EDGE_COLORS: tuple[Rgb, ...] = (
    (255, 0, 0),
    (255, 76, 0),
    (255, 153, 0),
    (255, 229, 0),
    (203, 255, 0),
    (127, 255, 0),
    (50, 255, 0),
    (0, 255, 25),
    (0, 255, 102),
    (0, 255, 178),
    (0, 255, 255),
    (0, 178, 255),
    (0, 101, 255),
    (0, 25, 255),
    (50, 0, 255),
    (127, 0, 255),
    (204, 0, 255),
    (255, 0, 229),
    (255, 0, 153),
    (255, 0, 76),
)
HAND_POINT_COLOR: Rgb = (0, 0, 255)

FACE_POINTS = 68
# Brows, then eyes and mouth; jaw and nose are not drawn.
FACE_DRAWN: tuple[int, ...] = (*range(17, 27), *range(36, 68))
FACE_POINT_COLOR: Rgb = (255, 255, 255)

# COCO-WholeBody-133: 17 body, 6 foot, 68 face and 2 x 21 hand points.
KEYPOINTS = 133
FEET = slice(17, 23)
FACE = slice(23, 91)
LEFT_HAND = slice(91, 112)
RIGHT_HAND = slice(112, 133)
NOSE = 0
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
LEFT_WRIST, RIGHT_WRIST = 9, 10

# OpenPose slots 0 to 17, then left and right toes: each the mean of two of the 133 points.
BODY_PAIRS: tuple[tuple[int, int], ...] = (
    (0, 0),
    (5, 6),
    (6, 6),
    (8, 8),
    (10, 10),
    (5, 5),
    (7, 7),
    (9, 9),
    (12, 12),
    (14, 14),
    (16, 16),
    (11, 11),
    (13, 13),
    (15, 15),
    (2, 2),
    (1, 1),
    (4, 4),
    (3, 3),
    (17, 18),
    (20, 21),
)
