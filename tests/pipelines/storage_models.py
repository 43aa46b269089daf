"""Small transformers as published files hold them, and LoRAs for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipelines import tiny
from tests.tiny_models import scaled_fp8
from xicon_infer.models.wan import WanConfig, WanTransformer
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.weights.keymaps import to_wan_names
from xicon_infer.weights.strict import dit_policy, load_strict

T2V = WanConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=5, in_dim=16, text_dim=32, text_len=6, freq_dim=32
)
I2V = replace(T2V, in_dim=36, image_dim=32)
SCAIL = replace(T2V, in_dim=20, image_dim=32)


def published_state(config=I2V, *, build=WanTransformer, fp8=True):
    """Returns the tensors of a file: Kijai's scaled fp8, or float32."""
    state = tiny.tiny_transformer_state(build, config)
    return scaled_fp8(state) if fp8 else state


def load_model(state, config=I2V, *, build=WanTransformer, compute=torch.float32):
    """Returns the model loaded as the pipelines load it."""
    with torch.device("meta"):
        model = build(config)
    copies = {name: value.clone() for name, value in to_wan_names(state).items()}
    load_strict(model, copies, name="model", device="cpu", dtype_policy=dit_policy(compute))
    return model.eval()


def lora_tensors(state, *, seed=0, rank=4, size=0.1, only=""):
    """Returns a lightx2v-like LoRA: low-rank pairs, differences of biases, norms, modulation."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        if not name.startswith("blocks.") or only not in name or leaf == "scale_weight":
            continue
        if leaf == "weight" and value.ndim == 2:
            n, k = value.shape
            made[f"{path}.lora_down.weight"] = torch.randn(rank, k, generator=generator) / k**0.5
            made[f"{path}.lora_up.weight"] = size * torch.randn(n, rank, generator=generator)
            made[f"{path}.alpha"] = torch.tensor(rank / 2)
        else:
            end = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            made[f"{path}.{end}"] = size * torch.randn(value.shape, generator=generator)
    return made


def lora_file(state, name="lora", **options):
    """Returns such a LoRA as it is read from a file."""
    return LoraFile(name, read_lora(lora_tensors(state, **options)))


def velocity(model, seed=3):
    """Returns one forward of a plain Wan model, float32 [1, 16, 2, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    config = model.config
    image = None if config.image_dim is None else normal(1, 5, config.image_dim)
    latents, extra = normal(1, 16, 2, 4, 4), normal(1, 20, 2, 4, 4)
    condition = extra if config.in_dim == 36 else None
    with torch.no_grad():
        context = model.encode_context([normal(4, config.text_dim)], image)
        return model(latents, torch.tensor([600.0]), context, condition)


def snapshot(model):
    """Returns every tensor of a model by name: dtype and bytes."""
    return {name: snapshot_of(value) for name, value in model.state_dict().items()}


def snapshot_of(tensor):
    """Returns dtype and bytes of a tensor."""
    return tensor.dtype, tensor.clone().contiguous().reshape(-1).view(torch.uint8)


def same(first, second):
    """Returns whether two snapshots are equal bit by bit."""
    return first.keys() == second.keys() and all(
        first[name][0] == second[name][0] and torch.equal(first[name][1], second[name][1])
        for name in first
    )


def drift(actual, expected):
    """Returns the relative L2 distance."""
    return ((actual - expected).norm() / expected.norm()).item()
