"""What a job will do, before anything is loaded: sizes, steps, windows, work, memory and files.

The numbers come from the closed forms of `xicon_infer.formulas`; the media files are opened only
to learn their size and length. PyTorch is not imported.

Work and memory are predictions. Work leaves out drawing (but where drawing is all there is), video
files and copies. Memory is what the tensors of a stage need, without the CUDA context and the
reserve of the allocator. The plan of pipeline pose, and of finding poses, is `plan_pose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pipelines import plan_pose
from pipelines.plan_types import FilePlan, Plan, StagePlan, StepPlan, file_plan
from xicon_infer import formulas, formulas_vae
from xicon_infer.errors import InvalidRequest
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import VaeShape
from xicon_infer.job import Job, resolve_frames
from xicon_infer.media.image import load_image, resized_size
from xicon_infer.media.selection import select_frames
from xicon_infer.media.video import probe
from xicon_infer.pose.track import load_tracks
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import latent_frames
from xicon_infer.weights.manifest import FileEntry, files_for, load_manifest

__all__ = [
    "FilePlan",
    "Plan",
    "StagePlan",
    "StepPlan",
    "driving_frames",
    "make_plan",
    "plan_steps",
]

SIZE_MULTIPLE = 32

# The sequence length up to which both branches of the guidance share a forward pass; the same
# number as in pipelines.scail, which imports PyTorch. A test compares them, and the tiny sizes.
BATCHED_TOKENS = 8192
TINY_DIT = DitShape(
    128, 256, 2, 1, 20, image_tokens=17, pose_channels=20, text_dim=64, image_dim=64
)
TINY_VAE = VaeShape(base=16)

_LORA_RANK = 64


@dataclass(frozen=True)
class _Sizes:
    """What the stages depend on."""

    dit: DitShape
    vae: VaeShape
    width: int
    height: int
    num_frames: int
    matrix_bytes: int
    element_bytes: int


def make_plan(job: Job, *, search_dirs: Sequence[Path] = ()) -> Plan:
    """Returns the plan of a job.

    Args:
        job: the job; its files exist.
        search_dirs: folders with weights.

    Raises:
        MediaError: a media file cannot be read.
        InvalidRequest: the sampler cannot make so many steps.
    """
    available, fps = driving_frames(job)
    if job.pipeline == "pose":
        if job.image is not None:
            load_image(job.image)  # refuses a damaged one
        persons = job.persons if job.track is None else len(load_tracks(job.track))
        return plan_pose.make_pose_plan(
            job, available, fps=fps, persons=persons, search_dirs=search_dirs
        )
    width, height = _video_size(job)
    num_frames, warnings = resolve_frames(available, job.num_frames)
    sizes = _sizes(job, width, height, num_frames)
    steps = plan_steps(job, sizes.dit, width, height, num_frames)
    found = plan_pose.pose_stages(job, available)
    stages = (*found, *_stages(job, sizes, steps))
    context = _context(job)
    looped = context.looped and context.active(num_frames)
    return Plan(
        pipeline=job.pipeline,
        preset=job.preset,
        width=width,
        height=height,
        fps=float(fps),
        driving_frames=available,
        num_frames=num_frames,
        output_frames=num_frames + 3 if looped else num_frames,
        latent_frames=latent_frames(num_frames),
        steps=steps,
        tokens=max(step.tokens for step in steps),
        forwards=sum(step.forwards for step in steps),
        stages=stages,
        total_flops=sum(stage.flops for stage in stages),
        peak_memory_bytes=max(stage.weight_bytes + stage.work_bytes for stage in stages),
        resident_memory_bytes=_resident(stages),
        files=_files(job, search_dirs),
        outputs=job.outputs(),
        warnings=(*job.warnings, *warnings),
        settings=job.settings(),
        notes=plan_pose.pose_notes(job),
    )


def _video_size(job: Job) -> tuple[int, int]:
    """Returns (W, H) of the result, as the fit makes it of the reference."""
    assert job.image is not None  # `make_job` refuses it
    height, width = load_image(job.image).shape[:2]
    return resized_size(
        width,
        height,
        target_width=job.width,
        target_height=job.height,
        fit=job.image_fit,
        divisible_by=SIZE_MULTIPLE,
    )


def driving_frames(job: Job) -> tuple[int, Fraction]:
    """Returns how many frames drive the video, and their rate.

    The rate is the option fps, else that of the driving video, else that of the pose itself.

    Raises:
        MediaError: a file cannot be read.
        InvalidRequest: no frame is left.
    """
    video = job.video if job.finds_poses else job.pose_video
    if video is not None:
        info = probe(video, field="video" if job.finds_poses else "pose_video")
        source = info.fps
        # A file that ends early: as many as the readable part has.
        count = round(info.duration_s * source) if info.num_frames is None else info.num_frames
    else:
        assert job.track is not None  # `make_job` refuses a job without any motion
        track = load_tracks(job.track)[0]
        source, count = track.fps, len(track.pose.keypoints)
    rate = _wanted_rate(job)
    selected = select_frames(
        float(source),
        count,
        force_rate=float(rate or 0),
        frame_load_cap=_frame_cap(job),
        skip_first_frames=job.skip_frames,
        select_every_nth=job.select_every_nth,
    )
    found = sum(1 for _ in selected)
    if found == 0:
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of {count} driving frames, got {job.skip_frames}",
            field="skip_frames",
            code="OUT_OF_RANGE",
        )
    return found, (rate or source) / job.select_every_nth


def _frame_cap(job: Job) -> int:
    """Returns the most driving frames that are read, 0 for all: no more than are drawn."""
    drawn = (job.num_frames or 0) if job.finds_poses or job.pipeline == "pose" else 0
    return min((cap for cap in (job.max_frames, drawn) if cap), default=0)


def _wanted_rate(job: Job) -> Fraction | None:
    """Returns the rate to resample to, None for the rate of the pose."""
    if job.frame_rate is not None or job.video is None:
        return job.frame_rate
    return probe(job.video, field="video").fps


def plan_steps(
    job: Job, dit: DitShape, width: int, height: int, num_frames: int
) -> tuple[StepPlan, ...]:
    """Returns what every sampling step will evaluate.

    Raises:
        InvalidRequest: the sampler cannot make so many steps.
    """
    schedule = make_schedule(job.scheduler, job.num_inference_steps, job.shift)
    context = _context(job)
    frames = latent_frames(num_frames)
    hw = formulas.frame_tokens(width, height)
    steps = []
    for index, timestep in enumerate(schedule.timesteps):
        share = index / job.num_inference_steps
        pose = job.pose_start <= share <= job.pose_end
        reference = job.ref_start <= share <= job.ref_end
        windows = [frames]
        if context.active(num_frames):
            windows = [len(window) for window in weighted_windows(context, index, frames)[0]]
        tokens = [formulas.scail_tokens(n, hw, pose=pose, reference=reference) for n in windows]
        branches = 2 if job.guided else 1
        flops = branches * sum(formulas.forward_flops(dit, count) for count in tokens)
        steps.append(
            StepPlan(
                float(timestep),
                tuple(windows),
                pose,
                reference,
                max(tokens),
                branches * len(windows),
                flops,
            )
        )
    return tuple(steps)


def _context(job: Job) -> ContextOptions:
    return ContextOptions(
        schedule=job.context_schedule,
        frames=job.context_frames,
        stride=job.context_stride,
        overlap=job.context_overlap,
        freenoise=job.freenoise,
        fuse=job.fuse_method,
    )


def _sizes(job: Job, width: int, height: int, num_frames: int) -> _Sizes:
    tiny = job.preset == "tiny"
    # Nothing is loaded that could tell the device: real weights are for a GPU, the tiny ones not.
    on_cpu = job.device == "cpu" or (job.device == "auto" and tiny)
    element = 4 if job.dtype == "fp32" or (job.dtype == "auto" and on_cpu) else 2
    return _Sizes(
        dit=TINY_DIT if tiny else formulas.SCAIL_14B,
        vae=TINY_VAE if tiny else formulas_vae.WAN_VAE,
        width=width,
        height=height,
        num_frames=num_frames,
        matrix_bytes=1 if job.preset == "fp8" else element,
        element_bytes=element,
    )


def _stages(job: Job, sizes: _Sizes, steps: Sequence[StepPlan]) -> tuple[StagePlan, ...]:
    element = sizes.element_bytes
    # float16 is not used outside the transformer: UMT5 overflows in it.
    vae_weights = formulas_vae.parameters(sizes.vae) * element
    vae = _vae_stages(job, sizes, vae_weights)
    branches = 2 if job.guided else 1
    noise_tokens = latent_frames(sizes.num_frames) * formulas.frame_tokens(
        sizes.width, sizes.height
    )
    together = {"batched": True, "sequential": False, "auto": noise_tokens <= BATCHED_TOKENS}
    dit_weights = formulas.weight_bytes(sizes.dit, sizes.matrix_bytes, element)
    if job.lora_mode != "merge":
        dit_weights += len(job.loras) * formulas.lora_bytes(sizes.dit, _LORA_RANK, element)
    flops = sum(step.flops for step in steps) + branches * formulas.cross_kv_flops(sizes.dit)
    work = formulas.sampling_bytes(
        sizes.dit,
        max(step.tokens for step in steps),
        element_bytes=element,
        branches=branches,
        batch=2 if job.guided and together[job.guidance_batching] else 1,
    )
    sampling = StagePlan("sample", flops, dit_weights, work)
    if job.preset == "tiny":  # its encoders are below a megabyte
        return (vae[0], sampling, vae[1])
    text_flops = branches * formulas.umt5_flops(formulas.TEXT_TOKENS)
    return (
        StagePlan("encode text", text_flops, formulas.UMT5_PARAMETERS * element, 0),
        StagePlan("encode image", formulas.clip_flops(), formulas.CLIP_PARAMETERS * element, 0),
        vae[0],
        sampling,
        vae[1],
    )


def _vae_stages(job: Job, sizes: _Sizes, weights: int) -> tuple[StagePlan, StagePlan]:
    """Returns encoding (one reference frame, the pose at half size) and decoding."""
    width, height, frames = sizes.width, sizes.height, sizes.num_frames
    vae, element = sizes.vae, sizes.element_bytes
    half = (width // 2, height // 2)
    encode = formulas_vae.encode_flops(width, height, 1, vae)
    encode += formulas_vae.encode_flops(*half, frames, vae)
    encode_work = max(
        formulas_vae.encode_bytes(width, height, 1, vae, element),
        formulas_vae.encode_bytes(*half, frames, vae, element),
    )
    tiles = [(width, height)]
    if job.tile:
        columns = formulas_vae.tile_spans(width, job.tile_width, job.tile_stride_width)
        rows = formulas_vae.tile_spans(height, job.tile_height, job.tile_stride_height)
        tiles = [(x1 - x0, y1 - y0) for y0, y1 in rows for x0, x1 in columns]
    decode = sum(formulas_vae.decode_flops(w, h, frames, vae) for w, h in tiles)
    decode_work = max(formulas_vae.decode_bytes(w, h, frames, vae, element) for w, h in tiles)
    return (
        StagePlan("encode reference and pose", encode, weights, encode_work),
        StagePlan("decode video", decode, weights, decode_work),
    )


def _resident(stages: Sequence[StagePlan]) -> int:
    """Returns the memory with every component on the device; both VAE stages share one.

    The pose networks are let go when the poses are found.
    """
    alone = ("decode video", plan_pose.FIND_POSES)
    weights = sum(stage.weight_bytes for stage in stages if stage.name not in alone)
    return weights + max(stage.work_bytes for stage in stages)


def _files(job: Job, search_dirs: Sequence[Path]) -> tuple[FilePlan, ...]:
    found = []
    if job.preset != "tiny":
        entries = files_for(job.pipeline, job.preset)
        found = [file_plan(entry, search_dirs) for entry in entries if entry.component != "lora"]
    found += plan_pose.pose_files(job, search_dirs)
    return (*found, *(_lora_file(lora.name, search_dirs) for lora in job.loras))


def _lora_file(name: str, search_dirs: Sequence[Path]) -> FilePlan:
    """Returns a LoRA by path, by a name in the manifest, or by a name in the folders."""
    if Path(name).is_file():
        return FilePlan("lora", name, Path(name), Path(name).stat().st_size)
    known = [entry for entry in load_manifest().files if name in entry.names]
    unknown = FileEntry("", "lora", (), "", name, None, None, None, "", "", (name,))
    return file_plan(known[0] if known else unknown, search_dirs)
