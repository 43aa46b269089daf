"""Replays of SteadyDancer: the model, its small modules, generation sizes and the key lists.

The files do not say how many heads a model has. That is found by trying: what gives the stored
prediction is taken, and everything else is checked with it. Sampling is `steady_dancer_sampling`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.steady_dancer_plan import generation_size
from tests.parity import steady_dancer_sampling
from tests.parity.golden import Check, Golden, exact, rel_max
from tests.parity.steady_dancer_sampling import MARK, MODEL_TOLERANCE, build_model, head_counts
from xicon_infer.models.steady_dancer import PoseSignal, SteadyDancerTransformer
from xicon_infer.models.steady_dancer_layers import (
    ChannelNorm,
    DynamicConv,
    FactorConv3d,
    PoseAlignment,
    Squeeze,
    hard_sigmoid,
    motion_module,
)
from xicon_infer.models.wan import WanConfig, WanTransformer, config_from_shapes, patchify
from xicon_infer.models.wan_layers import Head, ImageProjection

SINGLE_TOLERANCE, DOUBLE_TOLERANCE = 2e-6, 1e-12


class _DancerInputs:
    """The inputs of one forward pass, batch added, and the model they belong to."""

    def __init__(self, model: SteadyDancerTransformer, tensors: dict[str, Tensor]) -> None:
        self.model, self.tensors = model, tensors

    def run(
        self,
        *,
        condition: str = "in.condition",
        pose_clip: bool = True,
        spatial: float = 1.0,
        temporal: float = 1.0,
        posed: bool = True,
    ) -> Tensor:
        tensors, model = self.tensors, self.model
        pose = tensors[condition][None]
        first = tensors["in.ref_c"][None, :16] if condition == "in.condition" else pose[:, :, :1]
        signal = PoseSignal(
            model.fuse_pose(pose, spatial=spatial, temporal=temporal),
            model.embed_reference(tensors["in.ref_x"][None, :16]),
            model.embed_first_pose(first),
        )
        return model(
            tensors["in.x"][None],
            tensors["in.t"],
            self.context(pose_clip=pose_clip),
            tensors["in.y"][None],
            pose=signal if posed else None,
        )[0]

    def context(self, *, pose_clip: bool = True) -> list[Any]:
        pose_image = self.tensors["in.clip_fea_c"] if pose_clip else None
        text = [self.tensors["in.context"]]
        return self.model.encode_context(text, self.tensors["in.clip_fea_x"], pose_image)


def replay_forward(golden: Golden) -> list[Check] | None:
    """Replays one forward of the authors' model with its intermediates."""
    if MARK not in golden.keys or "out.noise_pred" not in golden.keys:
        return None
    inputs = _forward_inputs(golden)
    seen: dict[str, Tensor] = {}
    _watch(inputs.model, seen)
    with torch.no_grad():
        seen["noise_pred"] = inputs.run()
        seen |= _middle(inputs)
    stored = golden.under("mid.") | golden.under("out.")
    return [
        Check(f"{golden.path.stem}:{name}", rel_max(seen[name], expected), MODEL_TOLERANCE)
        for name, expected in stored.items()
    ]


def replay_wrapper(golden: Golden) -> list[Check] | None:
    """Replays the forward passes of the ComfyUI wrapper on the weights of another file."""
    names = [key for key in golden.keys if key.startswith("out.wrapper_")]
    if not names or "in.condition_neg" not in golden.keys:
        return None
    inputs = _forward_inputs(_weights_of(golden))
    inputs.tensors = inputs.tensors | golden.tensors
    with torch.no_grad():
        return [
            Check(
                f"{golden.path.stem}:{name.removeprefix('out.')}",
                rel_max(inputs.run(**_variant(name)), golden.tensors[name]),
                MODEL_TOLERANCE,
            )
            for name in sorted(names)
        ]


def replay_modules(golden: Golden) -> list[Check] | None:
    """Replays each small module alone, in float32 and in float64."""
    names = sorted({key.split(".")[1] for key in golden.keys if key.startswith("out.")})
    if not any(name.startswith(_DISTINCT) for name in names) or "in.x" in golden.keys:
        return None
    checks = []
    for name in names:
        build = _builder(name)
        if build is None:
            reason = f"{name} is no module of ours"
            checks.append(Check(f"{golden.path.stem}:{name}", math.inf, 0.0, skip=reason))
            continue
        for key, dtype, tolerance in (
            (f"out.{name}", torch.float32, SINGLE_TOLERANCE),
            (f"out64.{name}", torch.float64, DOUBLE_TOLERANCE),
        ):
            if key in golden.keys:
                actual = _run_module(golden, name, build, dtype)
                error = rel_max(actual, golden.tensors[key])
                checks.append(Check(f"{golden.path.stem}:{key}", error, tolerance))
    return checks + _module_middle(golden)


def replay_sizes(golden: Golden) -> list[Check] | None:
    """Replays the table of generation sizes."""
    if golden.kind != "json" or not isinstance(golden.json, dict) or "rows" not in golden.json:
        return None
    checks = []
    for row in golden.json["rows"]:
        if "ref_wh" not in row:
            return None
        width, height = row["ref_wh"]
        for area, expected in row.items():
            if area != "ref_wh":
                a, b = (int(side) for side in area.split("*"))
                size = generation_size(width, height, a * b)
                name = f"{golden.path.stem}:{width}x{height},{area}"
                checks.append(Check(name, exact(list(size), expected), 0.0))
    return checks


def replay_keys(golden: Golden) -> list[Check] | None:
    """Builds the real model on the meta device and compares every name and shape."""
    if golden.kind != "json" or not isinstance(golden.json, dict):
        return None
    found = [golden.json, *(v for v in golden.json.values() if isinstance(v, dict))]
    shapes = next((entry for entry in found if "patch_embedding_fuse.weight" in entry), None)
    if shapes is None:
        return None
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if "patch_embedding.weight" in expected:
        built = _shapes(SteadyDancerTransformer, config_from_shapes(expected))
    else:
        dim = expected["patch_embedding_fuse.weight"][0]
        config = WanConfig(dim, 4 * dim, 40, 1, 36, image_dim=1280)
        plain = _shapes(WanTransformer, config)
        both = _shapes(SteadyDancerTransformer, config)
        built = {name: shape for name, shape in both.items() if name not in plain}
    return [
        Check(f"{golden.path.stem}:{len(expected)} names and shapes", exact(built, expected), 0)
    ]


def _shapes(
    kind: Callable[[WanConfig], nn.Module], config: WanConfig
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in kind(config).state_dict().items()}


def _forward_inputs(golden: Golden) -> _DancerInputs:
    """Returns the model of a forward file with the number of heads that fits it."""
    tensors = golden.tensors
    text_len = tensors["mid.text_tokens"].shape[1]
    if golden.target is not None:  # rounded numbers tell two models apart less well
        config = _forward_inputs(golden.plain()).model.config
        return _DancerInputs(build_model(golden, config.num_heads, text_len), tensors)
    best: tuple[float, _DancerInputs] | None = None
    for heads in head_counts(golden):
        inputs = _DancerInputs(build_model(golden, heads, text_len), tensors)
        with torch.no_grad():
            error = rel_max(inputs.run(), tensors["out.noise_pred"])
        if best is None or error < best[0]:
            best = error, inputs
        if error <= MODEL_TOLERANCE:
            break
    assert best is not None
    return best[1]


def _watch(model: SteadyDancerTransformer, seen: dict[str, Tensor]) -> None:
    """Keeps what goes through the parts of the model while it runs, under the golden's names."""

    def output(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: seen.__setitem__(name, out)

    def entry(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.__setitem__(name, args[0])

    model.condition_embedding_temporal.register_forward_hook(output("condition_temporal"))
    model.condition_embedding_spatial.register_forward_hook(output("condition_spatial_bt"))
    model.condition_embedding_align.register_forward_pre_hook(entry("condition_fused"))
    model.condition_embedding_align.register_forward_hook(output("condition_aligned"))
    model.patch_embedding_fuse.register_forward_pre_hook(entry("patch_fuse_input"))
    model.patch_embedding_fuse.register_forward_hook(output("patch_fuse"))
    model.patch_embedding.register_forward_hook(output("patch_ref_x"))
    model.patch_embedding_ref_c.register_forward_hook(output("patch_ref_c"))
    model.blocks[0].register_forward_pre_hook(entry("block0_input"))


def _middle(inputs: _DancerInputs) -> dict[str, Tensor]:
    """Returns the intermediates that a forward does not show: contexts, times, untrimmed blocks."""
    model, tensors = inputs.model, inputs.tensors
    embedding, projection = model.embed_time(tensors["in.t"])
    text = model.embed_text([tensors["in.context"]])
    picture, pose = (model.img_emb(tensors[f"in.clip_fea_{side}"]) for side in "xc")
    middle = {"e": embedding, "e0_flat": projection.flatten(1), "text_tokens": text}
    middle |= {"img_emb": picture, "img_emb.call2": pose}
    middle["block0_context"] = torch.cat((picture + pose, text), dim=1)
    frames, rows, columns = tensors["in.x"].shape[1:]
    rope = model._rope_cache[("plain", frames + 2, rows // 2, columns // 2, model.device)]
    hidden = _tokens(inputs)
    for index, (block, cross) in enumerate(zip(model.layers, inputs.context(), strict=True)):
        hidden = block(hidden, projection, rope, cross, model.backend)
        middle[f"block{index}_output"] = hidden
    middle["head_output"] = model.head(hidden, embedding)
    return middle


def _tokens(inputs: _DancerInputs) -> Tensor:
    """Returns the whole sequence that the first block takes."""
    model, tensors = inputs.model, inputs.tensors
    fused = model.fuse_pose(tensors["in.condition"][None])
    noise = tensors["in.x"][None]
    parts = (noise, tensors["in.y"][None], fused, model.align_pose(fused, noise))
    return torch.cat(
        (
            patchify(model.patch_embedding_fuse, torch.cat(parts, dim=1)).to(model.dtype),
            model.embed_reference(tensors["in.ref_x"][None, :16]),
            model.embed_first_pose(tensors["in.ref_c"][None, :16]),
        ),
        dim=1,
    )


def _weights_of(golden: Golden) -> Golden:
    """Returns the forward file whose inputs these outputs belong to: by size, then by name."""
    shape = golden.tensors["in.condition_neg"].shape
    words = set(re.split(r"[_\W]+", golden.path.stem))
    folders = [golden.path.parent, *golden.roots]
    paths = dict.fromkeys(
        path for f in folders if f.is_dir() for path in sorted(f.rglob("*.safetensors"))
    )
    candidates = [Golden(path, golden.roots, golden.target) for path in paths]
    fitting = [
        c
        for c in candidates
        if {MARK, "in.condition"} <= c.keys and c.tensors["in.condition"].shape == shape
    ]
    if not fitting:
        raise FileNotFoundError(f"{golden.path.name} needs the weights of a forward file beside it")
    return max(fitting, key=lambda c: len(words & set(re.split(r"[_\W]+", c.path.stem))))


def _variant(name: str) -> dict[str, Any]:
    """Returns the arguments behind the name of an output of the wrapper."""
    options: dict[str, Any] = {"pose_clip": "with_pose_clip" in name}
    if "outside_window" in name:
        options["posed"] = False
    if "neg_pose" in name:
        options["condition"] = "in.condition_neg"
    for part, letter in (("spatial", "s"), ("temporal", "t")):
        if "strength" in name and (found := re.search(rf"_{letter}(\d+(?:\.\d+)?)", name)):
            options[part] = float(found[1])
    return options


class _Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _PictureNorm(ChannelNorm):
    """`ChannelNorm` for pictures [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


State = dict[str, Tensor]

_MODULES: dict[str, Callable[[State], nn.Module]] = {
    "factor_conv3d": lambda s: FactorConv3d(len(s["spatial.weight"])),
    "temporal_module": lambda s: motion_module(len(s["0.spatial.weight"])),
    "layernorm2d": lambda s: _PictureNorm(s["weight"].shape[1]),
    "align_unit": lambda s: PoseAlignment(*s["proj_p.weight"].shape[1::-1]),
    "dy_module": lambda s: DynamicConv(*s["conv.weight"].shape[1::-1]),
    "se_module_small": lambda s: Squeeze(len(s["fc.0.weight"])),
    "hsigmoid": lambda _: _Function(hard_sigmoid),
    "mlp_proj": lambda s: ImageProjection(*s["proj.3.weight"].shape[::-1]),
    "head": lambda s: Head(*s["head.weight"].shape[::-1], eps=1e-6),
}


_DISTINCT = ("factor_conv3d", "temporal_module", "layernorm2d", "align_unit", "dy_module")
"""Names that no other kind of file has among its outputs."""


def _builder(name: str) -> Callable[[State], nn.Module] | None:
    """Returns what builds a module; `dy_module_wide` is built as `dy_module`."""
    fitting = [known for known in _MODULES if name.startswith(known)]
    return _MODULES[max(fitting, key=len)] if fitting else None


def _run_module(
    golden: Golden, name: str, build: Callable[[State], nn.Module], dtype: torch.dtype
) -> Tensor:
    module = build(golden.under(f"weights.{name}.")).to(dtype)
    module.load_state_dict(golden.under(f"weights.{name}."))
    inputs = golden.under(f"in.{name}.")
    with torch.no_grad():
        result: Tensor = module(*(inputs[key].to(dtype) for key in sorted(inputs)))
    return result


def _module_middle(golden: Golden) -> list[Check]:
    """Returns the checks of the weights that a dynamic convolution makes for itself."""
    checks = []
    stored = golden.under("mid64.")
    for name in sorted({key.split(".")[0] for key in stored}):
        state = golden.under(f"weights.{name}.")
        module = DynamicConv(*state["conv.weight"].shape[1::-1]).double()
        module.load_state_dict(state)
        with torch.no_grad():
            found = module.weights_of(golden.tensors[f"in.{name}.0"].double())
        for part, actual in zip(("fc_out", "dy_phi", "dy_scale"), found, strict=True):
            if (expected := stored.get(f"{name}.{part}")) is not None:
                error = rel_max(actual.reshape(expected.shape), expected)
                check = Check(f"{golden.path.stem}:{name}.{part}", error, DOUBLE_TOLERANCE)
                checks.append(check)
    return checks


REPLAYS = (
    replay_forward,
    replay_wrapper,
    *steady_dancer_sampling.REPLAYS,
    replay_modules,
    replay_sizes,
    replay_keys,
)
