"""The SCAIL transformer: parts of the sequence, positions, windows, options."""

from __future__ import annotations

import pytest
import torch

from tests.models.builders import normal, tiny_scail
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.scail import (
    POSE_COLUMN_OFFSET,
    SCAIL_14B,
    PosePositions,
    ScailTransformer,
    scail_rope,
)
from xicon_infer.models.wan import config_from_shapes
from xicon_infer.ops.rope import axis_pairs

GRID = (3, 4, 4)  # T, rows, columns of tokens


class Inputs:
    def __init__(self, batch: int = 1) -> None:
        self.model = tiny_scail()
        self.latents = normal(batch, 16, 3, 8, 8)
        self.reference = normal(1, 16, 1, 8, 8, seed=1)
        self.pose = normal(1, 16, 3, 4, 4, seed=2)
        self.context = self.model.encode_context(
            [normal(5, 24, seed=3)] * batch, normal(1, 7, 20, seed=4).expand(batch, 7, 20)
        )

    def run(self, *, reference=1.0, pose=1.0, t=500.0, positions=None, latents=None):
        latents = self.latents if latents is None else latents
        return self.model(
            latents,
            torch.full((len(latents),), t),
            self.context,
            reference=None
            if reference is None
            else self.model.embed_reference(self.reference, reference),
            pose=None if pose is None else self.model.embed_pose(self.pose, pose),
            positions=positions,
        )


def test_every_option_changes_the_velocity():
    inputs = Inputs()
    results = [
        inputs.run(),
        inputs.run(reference=None),
        inputs.run(reference=0.0),
        inputs.run(reference=0.5),
        inputs.run(pose=None),
        inputs.run(pose=0.0),
        inputs.run(pose=0.5),
        inputs.run(t=499.0),
        inputs.run(positions=PosePositions(aligned=False)),
        inputs.run(positions=PosePositions(pooling="midpoint")),
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert not torch.allclose(first, second, atol=1e-5)


def test_reference_and_pose_pictures_count():
    inputs = Inputs()
    base = inputs.run()
    inputs.pose = inputs.pose.flip(2)
    assert not torch.allclose(base, inputs.run(), atol=1e-4)
    base = inputs.run()
    inputs.reference = inputs.reference.flip(-1)
    assert not torch.allclose(base, inputs.run(), atol=1e-4)


def test_batch_equals_singles():
    both = Inputs(batch=2)
    result = both.run()
    for i in range(2):
        single = Inputs()
        torch.testing.assert_close(
            single.run(latents=both.latents[i : i + 1]), result[i : i + 1], rtol=1e-5, atol=1e-5
        )


def test_trimming_the_last_block_changes_nothing():
    """The last block computes the noise tokens alone; the full block must agree."""
    inputs = Inputs()
    model = inputs.model
    expected = inputs.run()
    block = model.blocks[-1]
    trimmed = block.forward

    def untrimmed(x, modulation, rope, context, backend, keep=slice(None)):
        return trimmed(x, modulation, rope, context, backend)[:, keep]

    block.forward = untrimmed
    torch.testing.assert_close(inputs.run(), expected, rtol=1e-5, atol=1e-6)


def test_a_window_of_the_pose_is_the_pose_of_the_window():
    model = tiny_scail()
    pose = normal(1, 16, 5, 4, 4)
    torch.testing.assert_close(model.embed_pose(pose)[:, 1:4], model.embed_pose(pose[:, :, 1:4]))


def test_positions_of_every_part():
    rope = scail_rope(32, GRID, True, True, PosePositions())
    cells = GRID[1] * GRID[2]
    assert len(rope.cos) == (1 + GRID[0]) * cells + GRID[0] * cells // 4
    pairs = axis_pairs(32)
    time = torch.atan2(rope.sin[:, 0], rope.cos[:, 0])  # the first pair turns once per frame
    expected = [0.0] * cells + [t + 1.0 for t in range(3) for _ in range(cells)]
    expected += [t + 1.0 for t in range(3) for _ in range(cells // 4)]
    torch.testing.assert_close(time, torch.tensor(expected), atol=1e-5, rtol=0)
    late = scail_rope(32, GRID, True, True, PosePositions(aligned=False))
    shift = torch.atan2(late.sin[:, 0], late.cos[:, 0]) - time
    pose_tokens = GRID[0] * cells // 4
    assert shift[:-pose_tokens].abs().max() == 0
    torch.testing.assert_close(shift[-pose_tokens:], torch.full((pose_tokens,), -1.0))
    first_pose = -pose_tokens
    column = pairs[0] + pairs[1]
    angle = torch.atan2(rope.sin[first_pose, column], rope.cos[first_pose, column])
    middle = torch.tensor(POSE_COLUMN_OFFSET + 0.5)
    torch.testing.assert_close(angle, torch.atan2(middle.sin(), middle.cos()), atol=1e-5, rtol=0)


def test_pooled_angles_have_the_closed_form():
    """cos and sin of the midpoint times cos(omega / 2), as the average of two neighbours is."""
    pooled = scail_rope(32, GRID, False, True, PosePositions())
    middle = scail_rope(32, GRID, False, True, PosePositions(pooling="midpoint"))
    t, h, w = axis_pairs(32)
    factor = torch.ones(t + h + w, dtype=torch.float64)
    for start, n in ((t, h), (t + h, w)):
        omega = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
        factor[start : start + n] = (omega / 2).cos()
    pose = slice(GRID[0] * GRID[1] * GRID[2], None)
    torch.testing.assert_close(
        pooled.cos[pose], (middle.cos[pose] * factor).float(), atol=3e-6, rtol=0
    )
    torch.testing.assert_close(
        pooled.sin[pose], (middle.sin[pose] * factor).float(), atol=3e-6, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 16, 2, 4, 4), (1, 16, 3, 8, 8), (1, 16, 3, 4, 8)])
def test_a_pose_of_another_size_is_refused(shape):
    inputs = Inputs()
    inputs.pose = normal(*shape)
    with pytest.raises(InvalidRequest, match="multiples of 32"):
        inputs.run()


def test_the_real_size_on_the_meta_device():
    with torch.device("meta"):
        model = ScailTransformer(SCAIL_14B)
    state = model.state_dict()
    assert len(state) == 1305
    assert sum(value.numel() for value in state.values()) == 16_394_965_824
    assert config_from_shapes({k: tuple(v.shape) for k, v in state.items()}) == SCAIL_14B
