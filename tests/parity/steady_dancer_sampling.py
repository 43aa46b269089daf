"""Replays of SteadyDancer's sampling: every branch of every step, guidance, solver and noise.

The files do not say how many heads a model has, nor how long its text is padded. Both are found by
trying: what gives the stored first prediction is taken, and everything else is checked with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from pipelines.steady_dancer_options import SteadyDancerOptions
from pipelines.steady_dancer_plan import passes_per_step
from pipelines.steady_dancer_sampling import SteadyDancerConditioning, combine, make_branches
from tests.parity.golden import Check, Golden, exact, rel_max
from xicon_infer.models.steady_dancer import SteadyDancerTransformer
from xicon_infer.models.wan import config_from_shapes
from xicon_infer.sampling.denoise import denoise
from xicon_infer.sampling.noise import initial_noise
from xicon_infer.sampling.schedule import Schedule, make_schedule
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import SilentProgress, pixel_frames

MARK = "weights.patch_embedding_fuse.weight"
MODEL_TOLERANCE = 1e-5
SAMPLING_TOLERANCE = 1e-4
HEAD_DIM = 12
"""Of the models in the files at hand; tried first."""
TEXT_LENGTHS = (*range(1, 65), 77, 128, 256, 512)


def replay_sampling(golden: Golden) -> list[Check] | None:
    """Replays a whole run of the authors: every branch of every step, and the solver."""
    if MARK not in golden.keys or "mid.pred_cond" not in golden.keys:
        return None
    tensors, stem = golden.tensors, golden.path.stem
    options = _sampling_options(golden)
    schedule = make_schedule(options.scheduler, options.num_inference_steps, options.shift)
    with torch.no_grad():
        model, conditioning = _sampling_model(golden, options, schedule)
        states, velocities = _run(model, conditioning, options, schedule, tensors["in.noise"])
    drawn, _ = initial_noise(options.seed, tensors["in.noise"].shape)
    times = schedule.timesteps.tolist()
    checks = [
        *_count_checks(golden, options),
        _model_free(golden, options, schedule),
        Check(f"{stem}:timesteps", exact(times, tensors["mid.timesteps"].tolist()), 0.0),
        Check(f"{stem}:noise", rel_max(drawn, tensors["in.noise"]), 1e-6),
        Check(f"{stem}:latent", rel_max(states[-1], tensors["out.latent"]), SAMPLING_TOLERANCE),
    ]
    third = tensors["mid.null_condition_steps"].tolist()
    for step in range(schedule.num_steps):
        tolerance = MODEL_TOLERANCE if step == 0 else SAMPLING_TOLERANCE
        pairs = {
            "pred_cond": (velocities[step]["prompt"], tensors["mid.pred_cond"][step]),
            "pred_null_text": (velocities[step]["no_prompt"], tensors["mid.pred_null_text"][step]),
            "latent_before": (states[step], tensors["mid.latent_before_step"][step]),
        }
        if step in third:
            expected = tensors["mid.pred_null_condition"][third.index(step)]
            pairs["pred_null_condition"] = (velocities[step]["no_pose"], expected)
        checks += [
            Check(f"{stem}:step{step}.{name}", rel_max(actual, expected), tolerance)
            for name, (actual, expected) in pairs.items()
        ]
    return checks


def head_counts(golden: Golden) -> list[int]:
    """Returns the numbers of heads that a model may have, the likeliest first."""
    dim = golden.tensors[MARK].shape[0]
    for name in ("heads", "num_heads"):
        if name in golden.meta:
            return [int(golden.meta[name])]
    possible = [n for n in range(1, dim // 2 + 1) if dim % (2 * n) == 0]
    return sorted(possible, key=lambda heads: abs(dim // heads - HEAD_DIM))


def build_model(golden: Golden, heads: int, text_len: int) -> SteadyDancerTransformer:
    state = golden.under("weights.")
    config = config_from_shapes({name: tuple(value.shape) for name, value in state.items()})
    model = SteadyDancerTransformer(replace(config, num_heads=heads, text_len=text_len))
    model.load_state_dict(state)
    return golden.place(model.eval())


def _sampling_options(golden: Golden) -> SteadyDancerOptions:
    meta = golden.meta
    _, frames, rows, columns = golden.tensors["in.noise"].shape
    return SteadyDancerOptions(
        width=8 * columns,
        height=8 * rows,
        num_inference_steps=int(meta["steps"]),
        guidance_scale=float(meta["guide_scale"]),
        condition_guide_scale=float(meta["condition_guide_scale"]),
        st_cond_cfg=float(meta["st_cond_cfg"]),
        end_cond_cfg=float(meta["end_cond_cfg"]),
        shift=float(meta["shift"]),
        scheduler=f"{meta['solver']}/official",
        seed=int(meta["seed"]),
        guidance_batching="sequential",
        context=ContextOptions(frames=pixel_frames(frames) + 100),
    )


def _sampling_model(
    golden: Golden, options: SteadyDancerOptions, schedule: Schedule
) -> tuple[SteadyDancerTransformer, SteadyDancerConditioning]:
    """Returns the model whose first prediction is the stored one, and what it is told."""
    tensors = golden.tensors
    if golden.target is not None:  # rounded numbers tell two models apart less well
        config = _sampling_model(golden.plain(), options, schedule)[0].config
        model = build_model(golden, config.num_heads, config.text_len)
        return model, _conditioning(model, tensors)
    longest = max(len(tensors["in.context_pos"]), len(tensors["in.context_neg"]))
    best: tuple[float, SteadyDancerTransformer, SteadyDancerConditioning] | None = None
    timestep = torch.tensor(schedule.timesteps[:1], dtype=torch.float32)
    lengths = [n for n in TEXT_LENGTHS if n >= longest]
    for heads, text_len in product(head_counts(golden), lengths):
        model = build_model(golden, heads, text_len)
        conditioning = _conditioning(model, tensors)
        branches = make_branches(model, conditioning, options)
        first = branches(tensors["in.noise"][None], timestep, 0, None)["prompt"][0]
        error = rel_max(first, tensors["mid.pred_cond"][0])
        if best is None or error < best[0]:
            best = error, model, conditioning
        if error <= MODEL_TOLERANCE:
            break
    assert best is not None
    return best[1:]


def _conditioning(
    model: SteadyDancerTransformer, tensors: dict[str, Tensor]
) -> SteadyDancerConditioning:
    contexts = [
        model.encode_context(
            [tensors[f"in.context_{side}"]], tensors["in.clip_fea_x"], tensors["in.clip_fea_c"]
        )
        for side in ("pos", "neg")
    ]
    return SteadyDancerConditioning(
        with_prompt=contexts[0],
        without_prompt=contexts[1],
        start=tensors["in.y"][None],
        reference=model.embed_reference(tensors["in.ref_x"][None, :16]),
        first_pose=model.embed_first_pose(tensors["in.ref_c"][None, :16]),
        pose=tensors["in.condition_pos"][None],
        negative_pose=tensors["in.condition_neg"][None],
    )


def _run(
    model: SteadyDancerTransformer,
    conditioning: SteadyDancerConditioning,
    options: SteadyDancerOptions,
    schedule: Schedule,
    noise: Tensor,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Returns the latents before every step and after the last, and every branch's velocity."""
    branches = make_branches(model, conditioning, options)
    states: list[Tensor] = []
    velocities: list[dict[str, Tensor]] = []

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        found = branches(latents, timestep, step, None)
        states.append(latents[0].clone())
        velocities.append({name: velocity[0] for name, velocity in found.items()})
        return combine(found, options.guidance)

    final = _denoise(predict, noise, schedule)
    return [*states, final], velocities


def _model_free(golden: Golden, options: SteadyDancerOptions, schedule: Schedule) -> Check:
    """Returns the check of guidance and solver alone, fed with the stored predictions."""
    tensors = golden.tensors
    third = tensors["mid.null_condition_steps"].tolist()

    def predict(_latents: Tensor, _timestep: Tensor, step: int) -> Tensor:
        velocities = {
            "prompt": tensors["mid.pred_cond"][step],
            "no_prompt": tensors["mid.pred_null_text"][step],
        }
        if step in third:
            velocities["no_pose"] = tensors["mid.pred_null_condition"][third.index(step)]
        return combine(velocities, options.guidance)[None]

    final = _denoise(predict, tensors["in.noise"], schedule)
    error = rel_max(final, tensors["out.latent"])
    return Check(f"{golden.path.stem}:model-free latent", error, MODEL_TOLERANCE)


def _denoise(predict: Callable[..., Tensor], noise: Tensor, schedule: Schedule) -> Tensor:
    return denoise(predict, noise[None], schedule, generator=None, progress=SilentProgress())[0]


def _count_checks(golden: Golden, options: SteadyDancerOptions) -> list[Check]:
    """Returns the checks of which passes run in which step."""
    guidance, steps = options.guidance, options.num_inference_steps
    branches = [guidance.branches(step, steps) for step in range(steps)]
    names = {"prompt": "cond", "no_prompt": "null_text", "no_pose": "null_condition"}
    order = [names[name] for of_step in branches for name in of_step]
    third = [step for step, of_step in enumerate(branches) if "no_pose" in of_step]
    stored = str(golden.meta["branch_order"]).split(",")
    stem = golden.path.stem
    return [
        Check(
            f"{stem}:calls",
            exact(sum(passes_per_step(guidance, steps)), int(golden.meta["calls"])),
            0.0,
        ),
        Check(f"{stem}:branch order", exact(order[: len(stored)], stored), 0.0),
        Check(
            f"{stem}:third passes",
            exact(third, golden.tensors["mid.null_condition_steps"].tolist()),
            0.0,
        ),
    ]


REPLAYS = (replay_sampling,)
