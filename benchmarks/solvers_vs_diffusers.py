"""Our solvers against the schedulers of diffusers: import time, work per step, agreement.

    python benchmarks/solvers_vs_diffusers.py [--json FILE]

Needs no GPU. For each sampler both run the same fake model on the same tables; counted are the
tensor operations of one middle step, how many of them allocate or copy a tensor, how many read a
number back (a wait for the device if the tensor is there), and the largest relative difference
of the latents over the run. Operations on the library's own small coefficient tensors count too:
each is a dispatch on the host. The milliseconds (median step, one core) include drawing noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pose_render import commit, processor
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.solvers import make_solver

STEPS, SHIFT, SHAPE = 20, 5.0, (1, 16, 21, 52, 84)
COPIES = {"_to_copy", "clone", "copy_", "cat", "stack"}
READS = {"_local_scalar_dense"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}


class Counter(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Notes the operation and runs it."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "python -m benchmarks.solvers_vs_diffusers",
        "commit": commit(),
        "machine": processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
        "import_seconds": import_seconds(),
        "samplers": [compare(name) for name in library()],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "samplers"}, indent=2))
    print("sampler    ops ours/theirs   copies   reads   ms ours/theirs   difference")
    for row in result["samplers"]:
        ours, theirs = row["ours"], row["diffusers"]
        print(
            f"{row['sampler']:10} {ours['ops']:5} / {theirs['ops']:<8}"
            f"{ours['copies']:3} / {theirs['copies']:<4}{ours['reads']:3} / {theirs['reads']:<4}"
            f"{ours['milliseconds']:7.1f} / {theirs['milliseconds']:<8.1f}{row['difference']:.1e}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def import_seconds(repeats: int = 3) -> dict[str, float]:
    """Returns the median seconds of each import, in a fresh interpreter."""
    statements = {
        "torch": "import torch",
        "torch + xicon_infer.sampling": "import torch, xicon_infer.sampling.denoise",
        "torch + diffusers schedulers": (
            "import torch; from diffusers import DPMSolverMultistepScheduler, "
            "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler"
        ),
    }
    return {
        name: statistics.median(_fresh_import(code) for _ in range(repeats))
        for name, code in statements.items()
    }


def _fresh_import(statement: str) -> float:
    timed = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", timed], check=True, capture_output=True, text=True
    )
    return round(float(output.stdout), 2)


def library() -> dict[str, Any]:
    """Returns the diffusers scheduler of each sampler that has one."""
    from diffusers import (
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
    )

    return {
        "euler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        "lcm": FlowMatchLCMScheduler(shift=SHIFT),
        "unipc": UniPCMultistepScheduler(**FLOW),
        "dpm++": DPMSolverMultistepScheduler(**FLOW, algorithm_type="dpmsolver++"),
        "dpm++_sde": DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        "deis": DEISMultistepScheduler(**FLOW),
    }


def compare(name: str) -> dict[str, Any]:
    """Returns the counts, the time per step and the difference of one sampler."""
    schedule, theirs = make_schedule(name, STEPS, SHIFT), library()[name]
    theirs.set_timesteps(STEPS)
    theirs.sigmas = torch.tensor(schedule.sigmas)
    whole = theirs.timesteps.dtype == torch.int64
    theirs.timesteps = torch.tensor(schedule.timesteps, dtype=torch.int64 if whole else None)
    theirs.set_begin_index(0)
    solver = make_solver(schedule)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]

    def our_step(latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        noise = torch.randn(SHAPE, generator=generators[0]) if solver.draws_noise else None
        return solver.step(latents, velocity, index, noise)

    def their_step(latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        options = {"generator": generators[1]} if solver.draws_noise else {}
        timestep = theirs.timesteps[index]
        return theirs.step(velocity, timestep, latents, return_dict=False, **options)[0]

    ours, our_cost = _run(our_step, schedule.timesteps.tolist())
    others, their_cost = _run(their_step, schedule.timesteps.tolist())
    difference = max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, others, strict=True)
    )
    return {"sampler": name, "ours": our_cost, "diffusers": their_cost, "difference": difference}


def _run(step: Any, timesteps: list[float]) -> tuple[list[Tensor], dict[str, float]]:
    """Returns the latents after every step, and the cost of a middle step without the drawing."""
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    trail, seconds, names = [], [], []
    for index, timestep in enumerate(timesteps):
        velocity = 0.8 * latents + 0.3 * timestep / 1000
        with Counter() as counter:
            started = time.perf_counter()
            latents = step(latents, velocity, index)
            seconds.append(time.perf_counter() - started)
        trail.append(latents)
        if index == len(timesteps) // 2:
            names = [op for op in counter.names if op not in ("randn", "normal_")]
    cost = {
        "ops": len(names),
        "copies": sum(op in COPIES for op in names),
        "reads": sum(op in READS for op in names),
        "milliseconds": round(1000 * statistics.median(seconds), 2),
    }
    return trail, cost


if __name__ == "__main__":
    main()
