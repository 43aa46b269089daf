"""Replays of the transformers: forward passes, sampling with them, and the real key lists."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity import sampling as sampling_replays
from tests.parity.golden import Check, Golden, exact, rel_l2, rel_max
from xicon_infer.models.scail import PosePositions, ScailTransformer, scail_rope
from xicon_infer.models.wan import (
    Context,
    WanConfig,
    WanTransformer,
    config_from_shapes,
)
from xicon_infer.sampling.denoise import active_at, classifier_free, denoise, fused_windows
from xicon_infer.sampling.schedule import Schedule, make_schedule
from xicon_infer.sampling.windows import window_weights, windows
from xicon_infer.types import SilentProgress

WAN_TOLERANCE = 1e-4
SCAIL_TOLERANCE = 2e-5
WRAPPER = PosePositions(aligned=False)


def replay_wan(golden: Golden) -> list[Check] | None:
    """Replays one forward of a text- or image-to-video model with its intermediates."""
    if "out.velocity" not in golden.keys or "weights.patch_embedding.weight" not in golden.keys:
        return None
    tensors, config = golden.tensors, _config(golden.meta["config"])
    model = WanTransformer(config)
    model.load_state_dict(golden.under("weights."))
    golden.place(model)
    text = [tensors[f"in.context.{i}"] for i in range(len(tensors["in.x"]))]
    seen: dict[str, Tensor] = {}
    _watch(model, seen)
    with torch.no_grad():
        context = model.encode_context(text, tensors.get("in.clip_fea"))
        velocity = model(tensors["in.x"], tensors["in.t"], context, tensors.get("in.y"))
        embedding, projection = model.embed_time(tensors["in.t"])
        projected = model.embed_text(text)
        if "mid.img_emb" in tensors:
            seen["img_emb"] = model.img_emb(tensors["in.clip_fea"])
    seen["time_emb"], seen["time_proj"] = embedding, projection.flatten(1)
    seen["text_emb"] = projected[:, : tensors["mid.text_emb"].shape[1]]
    checks = [
        Check(
            f"{golden.path.stem}:velocity",
            rel_max(velocity, tensors["out.velocity"]),
            WAN_TOLERANCE,
        )
    ]
    for name, expected in golden.under("mid.").items():
        if name == "patch_emb_last_sample":
            seen[name] = seen["patches"][-1:]
        checks.append(
            Check(f"{golden.path.stem}:{name}", rel_max(seen[name], expected), WAN_TOLERANCE)
        )
    return checks


def replay_scail(golden: Golden) -> list[Check] | None:
    """Replays one SCAIL forward under every variant stored, with its intermediates."""
    if "weights.patch_embedding_pose.weight" not in golden.keys or "in.pose" not in golden.keys:
        return None
    model, tensors, stem = _scail(golden), golden.tensors, golden.path.stem
    noise, t = tensors["in.noise"][None], tensors["in.t"]
    with torch.no_grad():
        inputs = _ScailInputs(model, tensors)
        outputs = {name: inputs.run(noise, t, **_variant(name)) for name in golden.under("out.")}
        middle = _scail_middle(model, inputs, tensors)
    checks = [
        Check(f"{stem}:{name}", rel_l2(outputs[name][0], expected), SCAIL_TOLERANCE)
        for name, expected in golden.under("out.").items()
    ]
    return checks + [
        Check(f"{stem}:{name}", rel_l2(middle[name], expected), SCAIL_TOLERANCE)
        for name, expected in golden.under("mid.").items()
    ]


def replay_scail_sampling(golden: Golden) -> list[Check] | None:
    """Replays a whole sampling run, step by step, under every tag stored."""
    config = golden.meta.get("config", {})
    if "sampler" not in config or "in.pose" not in golden.keys:
        return None
    model, tensors = _scail(golden.sibling(config["weights"])), golden.tensors
    # A file with tags was made by the wrapper, one without by the authors' sampler.
    official = f"{config['sampler']}/official"
    name = official if _tags(golden) == [""] else config["sampler"]
    schedule = make_schedule(name, config["steps"], float(config["shift"]))
    checks = [
        Check(
            f"{golden.path.stem}:sigmas",
            rel_max(torch.from_numpy(schedule.sigmas), tensors["mid.sigmas"]),
            1e-6,
        )
    ]
    tolerance = 3e-5 if "in.step_noise0" in tensors else 1e-4
    for tag in _tags(golden):
        steps, velocities = _sample(model, tensors, schedule, config, tag)
        prefix = f"{tag}." if tag else ""
        pairs = {f"out.{prefix}latent": steps[-1]}
        pairs |= {f"mid.{prefix}latent_after_step{i}": x for i, x in enumerate(steps)}
        pairs |= {f"mid.{prefix}velocity{i}": v for i, v in enumerate(velocities)}
        checks += [
            Check(f"{golden.path.stem}:{key}", rel_l2(value, tensors[key]), tolerance)
            for key, value in pairs.items()
            if key in tensors
        ]
    return checks


def replay_scail_windows(golden: Golden) -> list[Check] | None:
    """Replays one context-windowed model evaluation."""
    if "mid.counter" not in golden.keys or "in.pose" not in golden.keys:
        return None
    config, tensors = golden.meta["config"], golden.tensors
    model = _scail(golden.sibling(config["weights"]))
    latents = tensors["in.latent"][None]
    frames, overlap = latents.shape[2], config["overlap"]
    lists = windows(
        config["schedule"], config["step"], frames, config["context"], config["stride"], overlap
    )
    masks = [window_weights(w, frames, overlap, config["fuse"]) for w in lists]
    checks = sampling_replays.check_windows(golden)
    with torch.no_grad():
        inputs = _ScailInputs(model, tensors)
        for tag in _tags(golden):

            def predict(part: Tensor, window: list[int], tag: str = tag) -> Tensor:
                return inputs.run(part, tensors["in.t"], window=window, positions=_rule(tag))

            fused = fused_windows(predict, latents, lists, masks)
            error = rel_l2(fused[0], tensors[f"out.{tag}.fused"])
            checks.append(Check(f"{golden.path.stem}:{tag}.fused", error, SCAIL_TOLERANCE))
    return checks


def replay_keys(golden: Golden) -> list[Check] | None:
    """Builds the real model on the meta device and compares every name and shape."""
    if golden.kind != "json" or not isinstance(golden.json, dict):
        return None
    shapes = golden.json.get("keys", golden.json)
    if not isinstance(shapes, dict) or "patch_embedding.weight" not in shapes:
        return None
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if any(name.startswith("condition_embedding") for name in expected):
        return None
    config = config_from_shapes(expected)
    kind = ScailTransformer if "patch_embedding_pose.weight" in expected else WanTransformer
    with torch.device("meta"):
        model: nn.Module = kind(config)
    built = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return [
        Check(f"{golden.path.stem}:{len(expected)} names and shapes", exact(built, expected), 0)
    ]


def _variant(name: str) -> dict[str, Any]:
    """Returns the arguments behind the name of an output, as `wrapper_pose_strength_0p5`."""
    options: dict[str, Any] = {}
    if name.startswith("wrapper"):
        options["positions"] = WRAPPER
    if "neg_text" in name or "uncond" in name:
        options["text"] = "in.text_neg"
    if "uncond" in name:
        options["reference_strength"] = 0.0
    if "pose_off" in name:
        options["pose_strength"] = None
    for part in ("pose", "reference"):
        if found := re.search(rf"{part}_strength_(\d+)p(\d+)", name):
            options[f"{part}_strength"] = float(f"{found[1]}.{found[2]}")
    return options


class _ScailInputs:
    """The conditioning of a golden file, encoded once per text."""

    def __init__(self, model: ScailTransformer, tensors: dict[str, Tensor]) -> None:
        self.model, self.tensors = model, tensors
        self.contexts: dict[str, Context] = {}

    def context(self, text: str) -> Context:
        if text not in self.contexts:
            states = [self.tensors[text]]
            self.contexts[text] = self.model.encode_context(states, self.tensors["in.clip"])
        return self.contexts[text]

    def run(
        self,
        noise: Tensor,
        t: Tensor,
        *,
        text: str = "in.text",
        reference_strength: float = 1.0,
        pose_strength: float | None = 1.0,
        positions: PosePositions | None = None,
        window: list[int] | None = None,
    ) -> Tensor:
        reference = self.model.embed_reference(self.tensors["in.ref"][None], reference_strength)
        pose = None
        if pose_strength is not None:
            pose = self.model.embed_pose(self.tensors["in.pose"][None], pose_strength)
            pose = pose if window is None else pose[:, window]
        return self.model(
            noise, t, self.context(text), reference=reference, pose=pose, positions=positions
        )


def _scail_middle(
    model: ScailTransformer, inputs: _ScailInputs, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the intermediates of the forward pass, under the names of the golden file."""
    noise, pose = tensors["in.noise"][None], tensors["in.pose"][None]
    zeros = noise.new_zeros(1, 4, *noise.shape[2:])
    embedding, projection = model.embed_time(tensors["in.t"])
    grid = model.token_grid(torch.cat((noise, zeros), dim=1))
    tokens = torch.cat(
        (
            model.embed_reference(tensors["in.ref"][None]),
            model.embed_patches(torch.cat((noise, zeros), dim=1)),
            model.embed_pose(pose).flatten(1, 2),
        ),
        dim=1,
    )
    head_dim = model.config.head_dim
    ropes = {
        rule: scail_rope(head_dim, grid, True, True, p).to(model.device)
        for rule, p in (("official", PosePositions()), ("wrapper", WRAPPER))
    }
    middle = {f"rope_{k}": torch.stack((r.cos, r.sin), dim=-1) for k, r in ropes.items()}
    middle |= {"time_e": embedding, "time_e0": projection, "tokens": tokens}
    middle["text_ctx"] = model.embed_text([tensors["in.text"]])
    middle["clip_ctx"] = model.img_emb(tensors["in.clip"])
    for rule, rope in ropes.items():
        hidden = tokens
        for index, (block, cross) in enumerate(
            zip(model.blocks, inputs.context("in.text"), strict=True)
        ):
            hidden = block(hidden, projection, rope, cross, model.backend)
            middle[f"block{index}_{rule}_rope"] = hidden
        kept = tokens.shape[1] - pose.shape[2] * (grid[1] * grid[2] // 4)
        middle["head_in"] = hidden[:, :kept]
    return middle


def _sample(
    model: ScailTransformer,
    tensors: dict[str, Tensor],
    schedule: Schedule,
    config: dict[str, Any],
    tag: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the latents after each step and the velocities, [16, T, H, W] each."""
    inputs, velocities, steps = _ScailInputs(model, tensors), [], []
    window = (config.get("pose_start", 0.0), config.get("pose_end", 1.0))

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        if step:
            steps.append(latents[0].clone())
        active = active_at(step, config["steps"], *window)
        strength, rule = (1.0 if active else None), _rule(tag)
        velocity = inputs.run(latents, timestep, pose_strength=strength, positions=rule)
        if config["cfg"] != 1:
            negative = inputs.run(
                latents,
                timestep,
                text="in.text_neg",
                pose_strength=strength,
                positions=rule,
                # The wrapper empties the reference of its unconditional branch.
                reference_strength=0.0 if tag else 1.0,
            )
            velocity = classifier_free(velocity, negative, config["cfg"])
        velocities.append(velocity[0].clone())
        return velocity

    noises = [
        tensors[f"in.step_noise{i}"][None]
        for i in range(config["steps"])
        if f"in.step_noise{i}" in tensors
    ]
    with torch.no_grad():
        final = denoise(
            predict,
            tensors["in.noise"][None],
            schedule,
            generator=torch.Generator(),
            progress=SilentProgress(),
            step_noises=noises or None,
        )
    return [*steps, final[0]], velocities


def _rule(tag: str) -> PosePositions:
    return WRAPPER if tag == "wrapper" else PosePositions()


def _tags(golden: Golden) -> list[str]:
    """Returns the tags of the outputs: `out.<tag>.<what>` or `out.<what>` (tag "")."""
    names = [key.split(".") for key in golden.keys if key.startswith("out.")]
    return sorted({name[1] if len(name) == 3 else "" for name in names})


def _scail(golden: Golden) -> ScailTransformer:
    model = ScailTransformer(_config(golden.meta["config"]))
    model.load_state_dict(golden.under("weights."))
    return golden.place(model)


def _config(stored: dict[str, Any]) -> WanConfig:
    """Returns our configuration for the one stored in a golden file."""
    clip = stored.get("clip") or [None, None]
    return WanConfig(
        dim=stored["dim"],
        ffn_dim=stored["ffn_dim"],
        num_heads=stored["num_heads"],
        num_layers=stored["num_layers"],
        in_dim=stored["in_dim"],
        out_dim=stored["out_dim"],
        text_dim=stored["text_dim"],
        text_len=stored["text_len"],
        image_dim=stored.get("clip_dim", clip[1]),
        freq_dim=stored["freq_dim"],
        patch=tuple(stored.get("patch_size", (1, 2, 2))),
    )


def _watch(model: WanTransformer, seen: dict[str, Tensor]) -> None:
    """Keeps the outputs of the blocks and their attentions while the model runs."""

    def keep(name: str) -> Any:
        return lambda _module, _args, out: seen.__setitem__(name, out)

    model.patch_embedding.register_forward_hook(keep("patches"))
    model.head.register_forward_hook(keep("head"))
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{index}"))
        block.self_attn.register_forward_hook(keep(f"block{index}.self_attn"))
        block.cross_attn.register_forward_hook(keep(f"block{index}.cross_attn"))


REPLAYS = (replay_wan, replay_scail, replay_scail_windows, replay_scail_sampling, replay_keys)
