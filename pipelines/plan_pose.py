"""The plan of finding poses, and of pipeline pose as a whole; loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from pipelines.plan_types import FilePlan, Plan, StagePlan, file_plan
from xicon_infer import formulas_pose
from xicon_infer.job import Job
from xicon_infer.weights.manifest import files_for, presets

FIND_POSES = "find poses"
DRAW_POSE = "draw pose"

# Frames that go through the networks, or are drawn, together: as in pipelines.pose and
# xicon_infer.pose.render, which import PyTorch. A test compares them.
BATCH = 16
BUILT_IN_DETECTORS = ("yolov10m", "yolox")

_FLOAT_BYTES = 4
_DETECTOR_SIDE = 640
# A crop of 256 x 192 x 3 going in, 133 maps of 64 x 48 coming out, a body crop of 384 x 384 x 3.
_PERSON_NUMBERS = 256 * 192 * 3 + 133 * 64 * 48 + 384 * 384 * 3
_RGBA = 4


def make_pose_plan(
    job: Job,
    available: int,
    *,
    fps: Fraction,
    persons: int,
    search_dirs: Sequence[Path],
) -> Plan:
    """Returns the plan of pipeline pose: poses are found or read, and drawn at full size.

    Args:
        job: of pipeline pose.
        available: driving frames, all of which are drawn.
        fps: their rate.
        persons: how many are drawn.
        search_dirs: folders with weights.
    """
    width, height = job.width, job.height
    drawing = StagePlan(
        DRAW_POSE,
        formulas_pose.drawing_flops(width, height, available, persons),
        0,
        min(BATCH, available) * width * height * _RGBA * _FLOAT_BYTES,
    )
    stages = (*pose_stages(job, available), drawing)
    peak = max(stage.weight_bytes + stage.work_bytes for stage in stages)
    return Plan(
        pipeline=job.pipeline,
        preset="",
        width=width,
        height=height,
        fps=float(fps),
        driving_frames=available,
        num_frames=available,
        output_frames=available,
        latent_frames=0,
        steps=(),
        tokens=0,
        forwards=0,
        stages=stages,
        total_flops=sum(stage.flops for stage in stages),
        peak_memory_bytes=peak,
        resident_memory_bytes=peak,
        files=tuple(pose_files(job, search_dirs)),
        outputs=job.outputs(),
        warnings=job.warnings,
        settings=job.settings(),
        notes=pose_notes(job),
    )


def pose_stages(job: Job, num_frames: int) -> tuple[StagePlan, ...]:
    """Returns the stage that finds poses; none where the motion is given.

    Counted are as many persons as are drawn, and the reference where the motion is fitted to it.
    """
    if not job.finds_poses and not job.aligns:
        return ()
    frames = num_frames if job.finds_poses else 0
    looked_at = frames + job.aligns
    people = frames * job.persons
    detecting, parameters = (0, 0)
    if job.detector_path is None:
        detecting, parameters = formulas_pose.detector_cost(job.detector)
    pointing, size = formulas_pose.keypoint_cost(job.keypoint_model)
    flops = looked_at * detecting + (people + job.aligns) * pointing
    flops += people * formulas_pose.body_flops(job.body_network)
    parameters += size
    if job.body_network == "nlf":
        parameters += formulas_pose.NLF_PARAMETERS
    batch = min(BATCH, looked_at)
    numbers = batch * (3 * _DETECTOR_SIDE**2 + job.persons * _PERSON_NUMBERS)
    work = numbers * _FLOAT_BYTES
    return (StagePlan(FIND_POSES, flops, parameters * _FLOAT_BYTES, work),)


def pose_notes(job: Job) -> tuple[str, ...]:
    """Returns what the stage "find poses" does not count."""
    if not job.finds_poses:
        return ()
    persons = "1 person" if job.persons == 1 else f"{job.persons} persons"
    notes = [f"find poses counts {persons} in a frame; everybody else seen costs as much again"]
    if job.body_network == "nlf":
        detector = formulas_pose.NLF_DETECTOR_FLOPS / 1e9
        notes.append(
            "NLF is given the boxes; where its file cannot take them, its own detector adds "
            f"{detector:.0f} GF a frame"
        )
    elif job.body_network == "rtmw3d":
        notes.append("the work and size of RTMW3D are not known and not counted")
    if job.detector_path is not None:
        notes.append(f"the work and size of {job.detector_path.name} are not counted")
    return tuple(notes)


def pose_files(job: Job, search_dirs: Sequence[Path]) -> list[FilePlan]:
    """Returns the files of the pose networks that the job needs, present and missing."""
    if not job.finds_poses and not job.aligns:
        return []
    names: list[str] = [job.body_network, job.keypoint_model]
    found = []
    if job.detector_path is None:
        names.append(job.detector)
    else:
        path = job.detector_path
        found.append(FilePlan("pose_detector", path.name, path, path.stat().st_size))
    every = {e.id: e for preset in presets()["pose"] for e in files_for("pose", preset)}
    wanted = (entry for entry in every.values() if entry.id.startswith(tuple(names)))
    return found + [file_plan(entry, search_dirs) for entry in wanted]
