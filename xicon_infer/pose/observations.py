"""What the pose networks saw, frame by frame, before anybody was followed from frame to frame.

Shape letters: P persons seen in the frame, K = 133 keypoints, J = 24 joints.
"""

from __future__ import annotations

from dataclasses import dataclass

from xicon_infer.types import Float32Array


@dataclass(frozen=True)
class Boxes:
    """Persons found in one frame, in no particular order; P may be 0.

    bboxes: float32 [P, 4], x1 y1 x2 y2 in pixels. scores: float32 [P], 0 to 1.
    ids: one identity per person where the detector follows them itself, else all -1.
    """

    bboxes: Float32Array
    scores: Float32Array
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Bodies:
    """3-D bodies found in one frame; P may be 0.

    joints: float32 [P, 24, 3], SMPL order, millimetres in camera space (x right, y down, z
    forward). uncertainties: float32 [P, 24], millimetres; zeros where the network gives none.
    """

    joints: Float32Array
    uncertainties: Float32Array


@dataclass(frozen=True)
class Observation:
    """Everything seen in one frame, person by person: row i of each array is the same person.

    keypoints: float32 [P, 133, 2] pixels. keypoint_scores: float32 [P, 133]. A person without a
    body has joints of zeros.
    """

    boxes: Boxes
    keypoints: Float32Array
    keypoint_scores: Float32Array
    bodies: Bodies
