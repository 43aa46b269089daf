"""One start of `benchmarks.cold_start`, in a process of its own; not started by hand.

Nothing but the standard library is imported before the clock of the imports runs. Prints one line
that begins with `MARK`: the seconds at which each step was done, counted from the moment at which
the process was asked for.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MARK = "start: "


class Steps:
    """Notes when each step was done, in seconds since the process was asked for."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.done: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Notes that a step is done now."""
        self.done[name] = time.time() - self.began


def main() -> None:
    """Starts as told by the first argument: a JSON object with began, path, device, grid, early."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    steps = Steps(told["began"])
    steps.note("python")
    path = Path(told["path"])
    facts: dict[str, Any] = {}
    if told["early"]:
        from xicon_infer.weights.warmup import warm_files

        early = warm_files([path])
        steps.note("reading begun")
    import torch

    steps.note("import torch")
    from pipelines import loading
    from xicon_infer import service
    from xicon_infer.weights.checkpoint import open_checkpoint

    facts["modules"] = len(sys.modules)
    facts["service"] = service.__name__
    steps.note("import the project")
    device = torch.device(told["device"])
    cuda = device.type == "cuda"
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.zeros(1, device=device)
    wait()
    steps.note("device context")
    touch_libraries(device)
    wait()
    steps.note("math libraries")
    options = loading.LoadOptions(
        device=device, dtype=torch.bfloat16, storage="reference", matmul=told["matmul"]
    )
    state = loading.read_state(open_checkpoint(path), options)
    wait()
    steps.note("read weights")
    if told["early"]:
        facts["early_bytes"] = early.bytes_read
        early.stop()
    transformer = load(state, options)
    wait()
    steps.note("assemble")
    forward = make_forward(transformer, told["grid"], device)
    for name in ("first forward", "second forward"):
        forward()
        wait()
        steps.note(name)
    facts["attention"] = transformer.backend
    print(MARK + json.dumps({"steps": steps.done, "facts": facts}), flush=True)


def touch_libraries(device: Any) -> None:
    """Has the libraries of products, convolutions and attention set themselves up."""
    import torch
    from torch.nn import functional

    x = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    functional.scaled_dot_product_attention(x, x, x)
    x[0, 0] @ x[0, 1]
    weight = torch.randn(2, 2, 1, 1, 1, device=device, dtype=x.dtype)
    functional.conv3d(x[:, :, None], weight)


def load(state: Any, options: Any) -> Any:
    """Returns the transformer of a file as the pipeline loads it, with its way to multiply."""
    from pipelines import loading
    from pipelines.storage import apply_storage

    transformer = loading._load_transformer("scail", state, options, [])
    apply_storage(transformer, options.storage, (), matmul=options.matmul, device=options.device)
    return transformer


def make_forward(transformer: Any, grid: list[int], device: Any) -> Any:
    """Returns a forward pass over random latents of the grid (T, h, w), conditioning ready."""
    import torch

    config, (frames, rows, columns) = transformer.config, grid
    with torch.inference_mode():
        text = torch.randn(16, config.text_dim, device=device)
        image = torch.randn(1, 257, config.image_dim, device=device)
        context = transformer.encode_context([text], image)
        reference = transformer.embed_reference(torch.randn(1, 16, 1, rows, columns, device=device))
        pose = transformer.embed_pose(
            torch.randn(1, 16, frames, rows // 2, columns // 2, device=device)
        )
    latents = torch.randn(1, 16, frames, rows, columns, device=device)
    timestep = torch.full((1,), 900.0, device=device)

    @torch.inference_mode()
    def forward() -> Any:
        return transformer(latents, timestep, context, reference=reference, pose=pose)

    return forward


if __name__ == "__main__":
    main()
