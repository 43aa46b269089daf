"""A `Plan` as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.plan_types import FilePlan, Plan, StepPlan

_GIGA, _MEGA, _TERA = 1e9, 1e6, 1e12


def format_plan(plan: Plan) -> str:
    """Returns the plan as lines of text: size, steps, stages, files, warnings."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    profile = plan.settings.get("profile")
    kind = f", preset {plan.preset}, profile {profile}" if plan.preset else ""
    yield f"pipeline   {plan.pipeline}{kind}"
    yield f"size       {plan.width}x{plan.height}, {plan.output_frames} frames at {plan.fps:g} fps"
    latent = f", {plan.latent_frames} latent frames" if plan.steps else ""
    driven = f"{plan.driving_frames} driving frames" if plan.driving_frames else "nothing drives it"
    yield f"           {driven}{latent}"
    if plan.steps:
        yield _sampling_line(plan)
        most = "up to " if plan.skips else ""
        forwards = f"{most}{plan.forwards} forward passes of at most {plan.tokens:,} tokens, "
    else:
        forwards = ""
    yield f"work       {forwards}{_flops(plan.total_flops)} in all"
    if not plan.memory:  # the plan for a card counts more closely
        yield (
            f"memory     {_bytes(plan.peak_memory_bytes)} with one model on the device at a time, "
            f"{_bytes(plan.resident_memory_bytes)} with all"
        )
    for number, line in enumerate(plan.memory):
        yield f"{'card' if not number else '':<11}{line}"
    if plan.steps:
        yield ""
        yield (
            "step    timestep  windows  passes  latent frames  pose  reference    tokens"
            "          work"
        )
        yield from _step_lines(plan.steps)
    yield ""
    yield f"{'stage':<28}{'work':>12}{'weights':>12}{'tensors':>12}"
    for stage in plan.stages:
        yield (
            f"{stage.name:<28}{_flops(stage.flops):>12}{_bytes(stage.weight_bytes):>12}"
            f"{_bytes(stage.work_bytes):>12}"
        )
    yield ""
    yield "files" if plan.files else "files      none needed"
    yield from (_file_line(file) for file in plan.files)
    yield f"writes     {', '.join(str(path) for path in plan.outputs.values())}"
    yield from (f"note       {note}" for note in plan.notes)
    yield from (f"warning    {warning}" for warning in plan.warnings)


def _sampling_line(plan: Plan) -> str:
    settings = plan.settings
    seed = "random" if settings["seed"] < 0 else settings["seed"]
    return (
        f"sampling   {settings['scheduler']}, {len(plan.steps)} steps, "
        f"shift {settings['shift']:g}, guidance {settings['guidance_scale']:g}, seed {seed}"
    )


def _step_lines(steps: Sequence[StepPlan]) -> Iterator[str]:
    """Yields a line per step; steps that differ in the timestep alone share one."""
    start = 0
    for index in range(1, len(steps) + 1):
        if index < len(steps) and _same(steps[start], steps[index]):
            continue
        yield _step_line(start, index - 1, steps)
        start = index


def _same(a: StepPlan, b: StepPlan) -> bool:
    first = (a.windows, a.forwards, a.pose, a.reference)
    return first == (b.windows, b.forwards, b.pose, b.reference)


def _step_line(first: int, last: int, steps: Sequence[StepPlan]) -> str:
    step = steps[first]
    number = f"{first}" if first == last else f"{first}-{last}"
    frames = "/".join(str(n) for n in sorted(set(step.windows)))
    work = sum(s.flops for s in steps[first : last + 1])
    return (
        f"{number:<6}{step.timestep:>10.1f}{len(step.windows):>9}{step.forwards:>8}{frames:>15}"
        f"{_yes(step.pose):>6}{_yes(step.reference):>11}{step.tokens:>10,}{_flops(work):>14}"
    )


def _file_line(file: FilePlan) -> str:
    size = "unknown size" if file.size_bytes is None else _bytes(file.size_bytes)
    if file.damaged:
        size = f"{file.size_bytes:,} bytes, {file.listed_bytes:,} are listed: fetch it again"
        return f"  {file.component:<14} DAMAGED  {file.path} ({size})"
    state = f"found    {file.path}" if file.path else f"MISSING  {file.name}"
    return f"  {file.component:<14} {state} ({size})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _bytes(value: int) -> str:
    return f"{value / _GIGA:.1f} GB" if value >= _GIGA else f"{value / _MEGA:.1f} MB"


def _flops(value: int) -> str:
    return f"{value / _TERA:,.0f} TF" if value >= _TERA else f"{value / _GIGA:,.1f} GF"
