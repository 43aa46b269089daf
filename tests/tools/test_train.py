"""The trainings of the tiny model: what a step is made of, the start, and going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.tiny import latents, train_dit, train_vae
from tools.tiny.optimise import load_checkpoint
from xicon_infer.models.scail import POSE_COLUMN_OFFSET, PosePositions, scail_rope
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.ops.rope import Rope, apply_rope


def make_data(clips: int = 4, frames: int = 7) -> latents.Latents:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    return latents.Latents(
        video=noise(clips, 16, frames, 8, 8),
        pose=noise(clips, 16, frames, 4, 4),
        reference=noise(clips, 16, 1, 8, 8),
        image=noise(clips, 3, 64),
        text=[noise(5 + n, 64) for n in range(clips)],
    )


def test_a_step_is_always_made_of_the_same() -> None:
    data = make_data()
    first, again, other = (train_dit.draw_batch([data], step) for step in (3, 3, 4))
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.sigma, again.sigma)
    assert first.noise.shape != other.noise.shape or not torch.equal(first.noise, other.noise)


def test_kinds_are_drawn_by_their_shares_and_batches_cost_the_same() -> None:
    small, large = make_data(frames=5), make_data(frames=5)
    large = large._replace(video=large.video.repeat(1, 1, 1, 2, 2))
    batches = [train_dit.draw_batch([small, small, large], step) for step in range(300)]
    wide = [batch for batch in batches if batch.clean.shape[-1] == 16]
    assert len(wide) / 300 == pytest.approx(0.35, abs=0.07)
    assert {batch.clean[:, 0].numel() for batch in batches} == {9600, 8960}
    assert {len(batch.clean) for batch in wide} == {7}


def test_conditions_are_dropped_as_often_as_told() -> None:
    data = make_data(clips=2, frames=5)
    batches = [train_dit.draw_batch([data], step) for step in range(400)]
    poses = sum(batch.pose is None for batch in batches) / 400
    references = sum(batch.reference is None for batch in batches) / 400
    assert poses == pytest.approx(0.125, abs=0.05)
    assert references == pytest.approx(0.05, abs=0.03)
    blind = torch.cat([batch.sigma for batch in batches if batch.pose is None])
    seeing = torch.cat([batch.sigma for batch in batches if batch.pose is not None])
    assert blind.max() <= 0.9
    assert seeing.max() == 1
    assert (seeing == 1).float().mean() > 0.05
    assert 0 < seeing.min() < 0.2


def test_windows_start_anywhere_and_whole_clips_occur() -> None:
    data = make_data(clips=1, frames=7)
    lengths, starts = set(), set()
    for step in range(120):
        batch = train_dit.draw_batch([data], step)
        lengths.add(batch.clean.shape[2])
        for row in batch.clean:
            found = [
                t for t in range(3) if torch.equal(row[:, :5], data.video[0, :, t : t + 5].float())
            ]
            starts.update(found)
        if batch.pose is not None:
            whole = batch.clean.shape[2] == 7
            assert whole or any(
                torch.equal(batch.pose[0], data.pose[0, :, t : t + 5].float()) for t in range(3)
            )
    assert lengths == {5, 7}
    assert starts == {0, 1, 2}


def test_the_first_look_is_at_the_pose_below() -> None:
    head_dim = train_dit.CONFIG.head_dim
    query, key = torch.nn.Linear(head_dim, head_dim), torch.nn.Linear(head_dim, head_dim)
    with torch.no_grad():
        train_dit.look_at_pose(query, key, head_dim)
    grid = (3, 8, 6)
    rope = scail_rope(head_dim, grid, True, True, PosePositions())
    count = len(rope.cos)
    q = apply_rope(query.bias.detach().expand(1, count, 1, head_dim), rope)[0, :, 0]
    k = apply_rope(key.bias.detach().expand(1, count, 1, head_dim), rope)[0, :, 0]
    scores = q @ k.T
    reference, noise = 48, 3 * 48
    for t, row, column in ((0, 1, 2), (1, 4, 5), (2, 7, 0)):
        mine = reference + t * 48 + row * 6 + column
        below = reference + noise + t * 12 + (row // 2) * 3 + column // 2
        assert scores[mine].argmax() == below
    assert POSE_COLUMN_OFFSET == 120
    assert isinstance(rope, Rope)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(train_dit.CONFIG, dim=128, ffn_dim=64, num_heads=1, num_layers=1)
    monkeypatch.setattr(train_dit, "CONFIG", config)
    monkeypatch.setattr(train_dit, "SAVE_EVERY", 3)
    monkeypatch.setattr(train_dit, "read_latents", lambda folder, count: make_data(count))


@pytest.mark.usefixtures("small")
def test_a_stopped_training_ends_where_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_dit.train(whole, steps=6, clips=[2], device="cpu")
    real = train_dit.draw_batch

    def stop(data: list[latents.Latents], step: int) -> train_dit.Batch:
        if step == 4:
            raise KeyboardInterrupt
        return real(data, step)

    monkeypatch.setattr(train_dit, "draw_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train_dit.train(parts, steps=6, clips=[2], device="cpu")
    assert [file.name for file in parts.glob("*.pt")] == ["dit.pt"]
    monkeypatch.setattr(train_dit, "draw_batch", real)
    train_dit.train(parts, steps=6, clips=[2], device="cpu")
    mine, theirs = load_checkpoint(whole / "dit.pt"), load_checkpoint(parts / "dit.pt")
    assert mine is not None
    assert theirs is not None
    assert mine["step"] == theirs["step"] == 6
    for name, value in mine["average"].items():
        torch.testing.assert_close(theirs["average"][name], value, rtol=0, atol=0)
    lines = [json.loads(line) for line in (whole / "dit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]


@pytest.mark.usefixtures("small")
def test_the_rate_falls_in_the_share_of_steps_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_dit.learning_rate
    # The warmup is longer than this run.
    monkeypatch.setattr(
        train_dit,
        "learning_rate",
        lambda *at, warmup, cooldown: real(*at, warmup=1, cooldown=cooldown),
    )
    found = []
    for cooldown in (0.3, 1.0):
        folder = tmp_path / str(cooldown)
        folder.mkdir()
        path = train_dit.train(folder, steps=4, clips=[2], device="cpu", cooldown=cooldown)
        kept = load_checkpoint(path)
        assert kept is not None
        found.append(kept["average"]["blocks.0.ffn.0.weight"])
    assert not torch.equal(*found)


def test_missing_latents_are_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"tools\.tiny\.latents .* --kind 96x160x17 --clips 3"
    ):
        latents.read_latents(tmp_path / "latents_96x160x17", 3)


def test_the_loss_of_the_vae_falls() -> None:
    vae = WanVAE(VAEConfig(dim=8, num_res_blocks=1))
    train_vae.start_weights(vae)
    frames = torch.zeros(2, 5, 16, 16, 3, dtype=torch.uint8)
    frames[:, :, 4:12, 4:12] = torch.tensor([200, 40, 90], dtype=torch.uint8)
    video = train_vae.to_video(frames)
    (first, *_), losses = train_vae.make_optimisers(vae, 2e-3, weight_decay=0.0), []
    for step in range(12):
        loss = train_vae.loss_of(vae, video, seed=step)
        loss.backward()
        first.step()
        first.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_batches_of_the_vae_are_poses_pictures_and_videos() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 33, 96, 64, 3), generator=generator, dtype=torch.uint8)
    pool = train_vae.Pool(frames, frames[:, :, :48, :32])
    cut = {tuple(train_vae.draw_batch(pool, step, whole=False).shape) for step in range(40)}
    whole = {tuple(train_vae.draw_batch(pool, step, whole=True).shape) for step in range(40)}
    assert cut == {
        (2, 3, 33, 48, 32),
        (16, 3, 1, 64, 64),
        (3, 3, 9, 64, 64),
        (1, 3, 33, 64, 64),
    }
    assert whole == {
        (2, 3, 33, 48, 32),
        (16, 3, 1, 96, 64),
        (3, 3, 9, 96, 64),
        (1, 3, 21, 96, 64),
    }
    batch = train_vae.draw_batch(pool, 1, whole=False)
    assert torch.equal(batch, train_vae.draw_batch(pool, 1, whole=False))
    assert batch.min() >= -1
    assert batch.max() <= 1
