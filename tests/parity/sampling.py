"""Replays of the sampling goldens: tables, trajectories, noise, windows, cache constants.

`REPLAYS` recognise a file by its content. `check_windows` covers the windows of the SCAIL file
whose other half needs the model; the replay of the model calls it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.parity.golden import Check, Golden, abs_max, exact, rel_max
from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.cache_tables import MAGCACHE_RATIOS, TEACACHE_POLYNOMIALS
from xicon_infer.sampling.denoise import denoise
from xicon_infer.sampling.noise import freenoise, initial_noise, step_noise
from xicon_infer.sampling.schedule import (
    INTEGER_TIMESTEPS,
    Schedule,
    make_schedule,
    step_limits,
)
from xicon_infer.sampling.solvers import make_solver
from xicon_infer.sampling.windows import ContextOptions, window_weights, windows
from xicon_infer.types import SCHEDULERS, SilentProgress

SIGMA_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-6
TRAJECTORY_TOLERANCE = 1e-5
SDE_TOLERANCE = 1e-4


def replay_tables(golden: Golden) -> list[Check] | None:
    """Sigmas and timesteps of a list of schedules (wrapper, official, sliced)."""
    entries = _entries(golden, {"scheduler", "steps", "shift", "sigmas", "timesteps"})
    if entries is None:
        return None
    checks = []
    for entry in entries:
        # The official tables name only the solver, and carry no dtype.
        official = "timesteps_dtype" not in entry and "start_step" not in entry
        name = entry["scheduler"] + ("/official" if official else "")
        case = f"{golden.path.stem}:{name},steps={entry['steps']},shift={entry['shift']}"
        if "start_step" in entry:
            case += f",{entry['start_step']}:{entry['end_step']}"
        checks += _table_checks(case, name, entry)
    return checks


def replay_sigma_lists(golden: Golden) -> list[Check] | None:
    """Sigma lists of the official SCAIL sampler and of the wrapper."""
    if golden.kind != "json" or not isinstance(golden.json, dict):
        return None
    if not {"official_rf", "wrapper"} <= set(golden.json):
        return None
    checks = []
    for case, sigmas in golden.json["official_rf"].items():
        entry = {**_options(case), "sigmas": sigmas}
        checks += _table_checks(f"{golden.path.stem}:official,{case}", "euler/official", entry)
    for case, table in golden.json["wrapper"].items():
        name, _, rest = case.partition(",")
        checks += _table_checks(f"{golden.path.stem}:{case}", name, {**_options(rest), **table})
    return checks


def replay_trajectories(golden: Golden) -> list[Check] | None:
    """Every step of every solver, with the fake model v = A x + b t / 1000 + c in the loop."""
    cases = golden.meta.get("cases")
    if not isinstance(cases, list) or not all("noise_draws" in case for case in cases):
        return None
    checks = []
    for case in cases:
        name = f"{golden.path.stem}:{case['case']}:{case['scheduler']},steps={case['steps']}"
        if case["scheduler"] not in SCHEDULERS:
            checks.append(Check(name, math.inf, 0.0, skip="not one of our samplers"))
            continue
        tensors = golden.under(f"{case['case']}.")
        schedule = make_schedule(case["scheduler"], case["steps"], case["shift"])
        tolerance = SDE_TOLERANCE if "sde" in case["scheduler"] else TRAJECTORY_TOLERANCE
        velocities, latents = _run(tensors, schedule)
        draws = make_solver(schedule).draws_noise
        checks += [
            Check(f"{name}:draws_noise", exact(draws, case["noise_draws"] > 0), 0.0),
            Check(f"{name}:velocity", _worst(velocities, tensors["mid.velocity"]), tolerance),
            Check(f"{name}:latents", _worst(latents, tensors["out.x_after_step"]), tolerance),
        ]
    return checks


def replay_seeded_noise(golden: Golden) -> list[Check] | None:
    """Initial noise, FreeNoise and step noise of one seed, in this order."""
    cases = golden.meta.get("cases")
    if not isinstance(cases, list) or not all("sde_steps" in case for case in cases):
        return None
    checks = []
    for case in cases:
        expected = golden.under(f"case{case['case']}.out.")
        shape = (16, case["latent_frames"], case["latent_h"], case["latent_w"])
        noise, generator = initial_noise(case["seed"], shape)
        actual = {"noise_initial": noise}
        options = ContextOptions(
            frames=case["context_frames_px"], overlap=case["context_overlap_px"]
        )
        context = options.latents()
        if options.active(case["num_frames"]):
            noise = freenoise(noise, context.frames, context.overlap, generator)
        actual["noise_after_freenoise"] = noise
        for step in range(case["sde_steps"]):
            actual[f"sde_noise_step{step}"] = step_noise(generator, (1, *shape))
        checks += [
            Check(f"{golden.path.stem}:case{case['case']}:{key}", exact(actual[key], value), 0.0)
            for key, value in expected.items()
        ]
    return checks


def replay_freenoise(golden: Golden) -> list[Check] | None:
    """FreeNoise of one seed: frames, their origin, and the generator's state afterwards."""
    if not {"in.params", "in.noise", "out.source_index", "out.next_randn"} <= golden.keys:
        return None
    tensors = golden.tensors
    frames, context, overlap, seed = (int(value) for value in tensors["in.params"])
    noise, generator = initial_noise(seed, tensors["in.noise"].shape)
    shuffled = freenoise(noise, context, overlap, generator)
    index = torch.arange(frames)[:, None, None]
    _, replayed = initial_noise(seed, noise.shape)
    source = freenoise(index, context, overlap, replayed)[:, 0, 0]
    actual = {
        "in.noise": noise,
        "out.noise": shuffled,
        "out.source_index": source,
        "out.next_randn": step_noise(generator, tensors["out.next_randn"].shape),
    }
    stem = golden.path.stem
    return [Check(f"{stem}:{key}", exact(actual[key], tensors[key]), 0.0) for key in actual]


def replay_pixel_windows(golden: Golden) -> list[Check] | None:
    """Windows and weights from options in pixel frames."""
    entries = _entries(golden, {"context_frames_px", "num_frames", "schedule"})
    if entries is None:
        return None
    checks = []
    for entry in entries:
        px = [entry[f"context_{key}_px"] for key in ("frames", "stride", "overlap")]
        case = f"{golden.path.stem}:{entry['schedule']},{entry['num_frames']}/" + "/".join(
            str(value) for value in px
        )
        try:
            options = ContextOptions(entry["schedule"], *px)
        except InvalidRequest as error:
            checks.append(Check(case, math.inf, 0.0, skip=f"refused: {error}"))
            continue
        disabled = entry.get("context_disabled", False)
        active = options.active(entry["num_frames"])
        checks.append(Check(f"{case}:active", exact(active, not disabled), 0.0))
        for step in entry.get("steps", []):
            checks += _window_checks(f"{case}:step{step['step']}", options, entry, step)
    return checks


def replay_latent_windows(golden: Golden) -> list[Check] | None:
    """Windows and linear weights from options in latent frames."""
    entries = _entries(golden, {"schedule", "context_frames", "latent_frames", "windows", "masks"})
    if entries is None:
        return None
    checks = []
    for entry in entries:
        total, overlap = entry["latent_frames"], entry["overlap"]
        found = windows(
            entry["schedule"],
            entry["step"],
            total,
            entry["context_frames"],
            entry["stride"],
            overlap,
        )
        looped = entry["schedule"] == "uniform_looped"
        weights = [window_weights(w, total, overlap, "linear", looped=looped) for w in found]
        case = (
            f"{golden.path.stem}:{entry['schedule']},T={total},context={entry['context_frames']},"
            f"stride={entry['stride']},overlap={overlap},step={entry['step']}"
        )
        checks += [
            Check(f"{case}:windows", _same_windows(found, entry["windows"], total), 0.0),
            _weight_check(f"{case}:weights", weights, entry["masks"]),
        ]
    return checks


def replay_cache_constants(golden: Golden) -> list[Check] | None:
    """The fitted constants of TeaCache and MagCache."""
    if golden.kind != "json" or "magcache_ratios_map" not in golden.json:
        return None
    checks = []
    for variant, modes in golden.json["teacache_coefficients_map"].items():
        for mode, polynomial in modes.items():
            actual = list(TEACACHE_POLYNOMIALS.get(variant, {}).get(mode, ()))
            name = f"{golden.path.stem}:teacache:{variant}:{mode}"
            checks.append(Check(name, exact(actual, polynomial), 0.0))
    for variant, ratios in golden.json["magcache_ratios_map"].items():
        actual = list(MAGCACHE_RATIOS.get(variant, ()))
        checks.append(Check(f"{golden.path.stem}:magcache:{variant}", exact(actual, ratios), 0.0))
    return checks


def check_windows(golden: Golden) -> list[Check]:
    """Returns the checks of `mid.windows` and `mid.counter` of a SCAIL context golden."""
    config, tensors = golden.meta["config"], golden.tensors
    total, overlap = tensors["in.latent"].shape[1], config["overlap"]
    found = windows(
        config["schedule"], config["step"], total, config["context"], config["stride"], overlap
    )
    looped = config["schedule"] == "uniform_looped"
    fuse = config["fuse"]
    weights = [window_weights(window, total, overlap, fuse, looped=looped) for window in found]
    error = abs_max(_counter(found, weights, total), tensors["mid.counter"].tolist())
    stem = golden.path.stem
    return [
        Check(f"{stem}:mid.windows", exact(found, tensors["mid.windows"].tolist()), 0.0),
        Check(f"{stem}:mid.counter", error, WEIGHT_TOLERANCE),
    ]


def _entries(golden: Golden, fields: set[str]) -> list[dict[str, Any]] | None:
    """Returns the records of a JSON list that have all the fields, or None if it is not one."""
    if golden.kind != "json" or not isinstance(golden.json, list) or not golden.json:
        return None
    has_fields = all(isinstance(e, dict) and fields <= set(e) for e in golden.json)
    return golden.json if has_fields else None


def _options(case: str) -> dict[str, float]:
    """Returns {"steps": 6, "shift": 5.0} for "steps=6,shift=5"."""
    pairs = (part.split("=") for part in case.split(","))
    return {key: int(value) if key == "steps" else float(value) for key, value in pairs}


def _table_checks(case: str, name: str, entry: dict[str, Any]) -> list[Check]:
    if name not in SCHEDULERS:
        return [Check(case, math.inf, 0.0, skip=f"{name} is not one of our samplers")]
    steps = entry["steps"]
    checks = []
    most = step_limits(name)[1]
    if steps > most:
        # Fixed tables: the reference cuts the request, we refuse it; the table is the same.
        checks.append(
            Check(f"{case}:refused", exact(_refuses(name, steps, entry["shift"]), True), 0)
        )
        steps = most
    slicing = {key: entry[key] for key in ("start_step", "end_step") if key in entry}
    schedule = make_schedule(name, steps, entry["shift"], **slicing)
    sigmas = [float(sigma) for sigma in schedule.sigmas]
    timesteps = schedule.timesteps.tolist()
    if name == "rcm":
        # The reference stores the angles whose tangent is sigma / (1 - sigma), here and there.
        sigmas = [math.atan2(sigma, 1 - sigma) for sigma in sigmas]
        timesteps = [math.atan2(t, 1000 - t) for t in timesteps]
    checks.append(Check(f"{case}:sigmas", abs_max(sigmas, entry["sigmas"]), SIGMA_TOLERANCE))
    if "timesteps" not in entry:
        return checks
    if "int" in entry.get("timesteps_dtype", "") or name.partition("/")[0] in INTEGER_TIMESTEPS:
        expected = [float(t) for t in entry["timesteps"]]
        checks.append(Check(f"{case}:timesteps", exact(timesteps, expected), 0.0))
    else:
        unit = 1.0 if name == "rcm" else 1000.0
        error = abs_max(timesteps, entry["timesteps"]) / unit
        checks.append(Check(f"{case}:timesteps", error, SIGMA_TOLERANCE))
    return checks


def _refuses(name: str, steps: int, shift: float) -> bool:
    try:
        make_schedule(name, steps, shift)
    except InvalidRequest:
        return True
    return False


def _run(tensors: dict[str, Tensor], schedule: Schedule) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the velocity and the latents after every step, in the reference's own scale."""
    constant = tensors["in.c"][:, None, None, None]
    slope = tensors["in.b"][:, None, None, None]
    velocities: list[Tensor] = []
    seen: list[Tensor] = []

    def predict(latents: Tensor, timesteps: Tensor, index: int) -> Tensor:
        mixed = torch.einsum("oc,bcthw->bothw", tensors["in.A"], latents)
        velocity = mixed + slope * (float(schedule.timesteps[index]) / 1000) + constant
        velocities.append(velocity[0])
        seen.append(latents[0])
        return velocity

    start = tensors["in.x"][None]
    noises = list(tensors.get("in.noise", ()))
    noises += [torch.zeros_like(start)] * (schedule.num_steps - len(noises))
    final = denoise(
        predict, start, schedule, generator=None, progress=SilentProgress(), step_noises=noises
    )
    latents = [*seen[1:], final[0]]
    if schedule.name == "rcm":
        sigmas = [float(sigma) for sigma in schedule.sigmas[1:]]
        latents = [x / math.hypot(s, 1 - s) for x, s in zip(latents, sigmas, strict=True)]
    return velocities, latents


def _worst(actual: list[Tensor], expected: Tensor) -> float:
    return max(rel_max(a, e) for a, e in zip(actual, expected, strict=True))


def _window_checks(
    case: str, options: ContextOptions, entry: dict[str, Any], step: dict[str, Any]
) -> list[Check]:
    total, context = entry["latent_frames"], options.latents()
    expected = [entry[f"{key}_latents"] for key in ("context", "stride", "overlap")]
    actual = [context.frames, context.stride, context.overlap]
    checks = [Check(f"{case}:latents", exact(actual, expected), 0.0)]
    found = windows(options.schedule, step["step"], total, *actual)
    if step["out_of_range"]:
        frames = {frame for window in found for frame in window}
        valid = frames == set(range(total)) and all(len(w) == context.frames for w in found)
        return [*checks, Check(f"{case}:guard", exact(valid, True), 0.0)]
    checks.append(Check(f"{case}:windows", _same_windows(found, step["windows"], total), 0.0))
    for fuse in ("linear", "pyramid"):
        if f"{fuse}_weights" not in step:
            continue
        weights = [
            window_weights(window, total, context.overlap, fuse, looped=options.looped)
            for window in found
        ]
        checks.append(_weight_check(f"{case}:{fuse}_weights", weights, step[f"{fuse}_weights"]))
        error = abs_max(_counter(found, weights, total), step[f"{fuse}_counter"])
        checks.append(Check(f"{case}:{fuse}_counter", error, WEIGHT_TOLERANCE))
    return checks


def _counter(found: list[list[int]], weights: list[list[float]], total: int) -> list[float]:
    """Returns the summed weight of every frame."""
    counter = [0.0] * total
    for window, of_window in zip(found, weights, strict=True):
        for frame, weight in zip(window, of_window, strict=True):
            counter[frame] += weight
    return counter


def _weight_check(name: str, actual: list[list[float]], expected: list[list[float]]) -> Check:
    pairs = zip(actual, expected, strict=False)
    error = max(abs_max(a, e) for a, e in pairs) if len(actual) == len(expected) else math.inf
    return Check(name, error, WEIGHT_TOLERANCE)


def _same_windows(actual: list[list[int]], expected: list[list[int]], total: int) -> float:
    """Returns 0 if the lists are equal, or ours adds windows for frames the reference lacks."""
    covered = {frame for window in expected for frame in window} == set(range(total))
    return exact(actual if covered else actual[: len(expected)], expected)


REPLAYS = (
    replay_tables,
    replay_sigma_lists,
    replay_trajectories,
    replay_seeded_noise,
    replay_freenoise,
    replay_pixel_windows,
    replay_latent_windows,
    replay_cache_constants,
)
