"""The LoRA of the tiny model: where it sits, what it starts as, and that its file is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.tools.test_train import make_data
from tools.tiny import train_dit, train_lora
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.ops.lora_keys import read_lora
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors

CONFIG = replace(train_dit.CONFIG, dim=128, ffn_dim=64, num_heads=1, num_layers=2)


def test_it_starts_as_nothing_and_moves_alone(tmp_path: Path) -> None:
    model = ScailTransformer(CONFIG)
    train_dit.start_weights(model)
    batch = train_dit.draw_batch([make_data()], 1)
    with torch.no_grad():
        before = train_dit.loss_of(model, batch)
    loras = train_lora.add_loras(model, 4)
    assert len(loras) == 2 * 6
    loss = train_dit.loss_of(model, batch)
    torch.testing.assert_close(loss.detach(), before)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(name.endswith((".up", ".down")) for name in moved)
    for lora in loras.values():
        torch.nn.init.normal_(lora.up, std=0.1)
    train_lora.write_lora(tmp_path / "grey.safetensors", loras)
    tensors = read_tensors(open_checkpoint(tmp_path / "grey.safetensors"))
    assert set(read_lora(tensors)) == set(loras)
    kept = tensors["diffusion_model.blocks.1.ffn.2.lora_B.weight"]
    torch.testing.assert_close(kept.float(), loras["blocks.1.ffn.2"].up.detach(), atol=1e-3, rtol=0)


def test_grey_keeps_the_light_and_drops_the_colour() -> None:
    frames = np.array([[[[255, 0, 0], [0, 255, 0]]]], np.uint8)
    grey = train_lora.to_grey(frames)
    assert grey.tolist() == [[[[76] * 3, [150] * 3]]]
