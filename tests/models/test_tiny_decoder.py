"""The small decoder: its layers against a plain reading of them, its files, its pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pipelines.tiny import seeded_state
from tests.models.vae_cases import Meter, noise
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.models.tiny_decoder import (
    TinyDecoder,
    TinyDecoderConfig,
    config_from_shapes,
    decoder_state,
)
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.strict import DtypePolicy, load_strict

SMALL = TinyDecoderConfig((12, 8, 6, 4))
LATENTS = noise(1, 16, 5, 3, 2)


def decoder(config=SMALL, dtype=torch.float64):
    model = TinyDecoder(config)
    model.load_state_dict(seeded_state(model))
    return model.to(dtype).eval()


def plainly(state, latents):
    """The published network frame by frame, from its tensors alone: latents [T, z, h, w]."""

    def conv(x, name, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)

    frames = [F.relu(conv(torch.tanh(x[None] / 3) * 3, "decoder.1")) for x in latents]
    for first, stride in ((3, 1), (9, 2), (15, 2)):
        for block in range(first, first + 3):
            before, made = torch.zeros_like(frames[0]), []
            for x in frames:
                y = torch.cat((x, before), dim=1)
                for index in (0, 2, 4):
                    y = conv(y, f"decoder.{block}.conv.{index}")
                    y = F.relu(y) if index < 4 else y
                made.append(F.relu(y + x))
                before = x
            frames = made
        frames = [F.interpolate(x, scale_factor=2, mode="nearest") for x in frames]
        grown = [conv(x, f"decoder.{first + 4}.conv", padding=0) for x in frames]
        frames = [part for x in grown for part in x.chunk(stride, dim=1)]
        frames = [conv(x, f"decoder.{first + 5}") for x in frames]
    pictures = [conv(F.relu(x), "decoder.22").clamp(0, 1) * 2 - 1 for x in frames]
    return torch.stack(pictures, dim=2)[:, :, 3:]


def video(model, latents=LATENTS, **options):
    return torch.cat(list(model.iter_decode(latents, **options)), dim=2)


@torch.no_grad()
def test_the_layers_do_what_the_published_code_says():
    model = decoder()
    wanted = plainly(model.state_dict(), LATENTS[0].double().movedim(1, 0))
    got = video(model)
    assert got.shape == (1, 3, 17, 24, 16)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert -1 <= got.min() < got.max() <= 1


def test_the_published_sizes():
    shapes = {n: tuple(p.shape) for n, p in TinyDecoder().state_dict().items()}
    assert config_from_shapes(shapes) == TinyDecoderConfig()
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert "decoder.20.bias" not in shapes


@pytest.mark.parametrize("chunk", [2, 3, 5, 9])
def test_the_result_does_not_depend_on_the_pieces(chunk):
    model = decoder()
    torch.testing.assert_close(video(model, chunk=chunk), video(model), rtol=1e-12, atol=1e-12)


def test_a_batch_is_its_single_videos():
    model, both = decoder(), noise(2, 16, 3, 2, 2)
    for i in range(2):
        torch.testing.assert_close(video(model, both)[i], video(model, both[i : i + 1])[0])


def test_the_past_acts_and_the_future_does_not():
    model, changed = decoder(), LATENTS.clone()
    changed[:, :, 2] += 1
    before, after = video(model), video(model, changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.allclose(before[:, :, 5:9], after[:, :, 5:9])
    assert not torch.allclose(before[:, :, 9:], after[:, :, 9:])


def test_memory_does_not_grow_with_the_length():
    model, peaks = decoder(dtype=torch.float32), []
    for frames in (3, 9):
        with Meter() as meter:
            for piece in model.iter_decode(noise(1, 16, frames, 4, 4)):
                del piece
        peaks.append(meter.peak)
    assert peaks[1] - peaks[0] <= 6 * 16 * 4 * 4 * 4


def test_wrong_input_is_refused_at_once():
    model = decoder()
    with pytest.raises(InvalidRequest, match="chunk is 0"):
        model.iter_decode(LATENTS, chunk=0)
    with pytest.raises(InvalidRequest, match=r"latents is \(1, 4, 1, 2, 2\).*\[B, 16, T"):
        model.iter_decode(torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
def test_files_load_whatever_encoder_is_in_them(tmp_path, end):
    wanted = decoder(dtype=torch.float32)
    state = {**wanted.state_dict(), "encoder.0.weight": torch.zeros(4, 3, 3, 3)}
    path = tmp_path / f"taew2_1{end}"
    if end == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    found = decoder_state(read_tensors(open_checkpoint(path)))
    model = TinyDecoder(config_from_shapes({n: tuple(v.shape) for n, v in found.items()}))
    load_strict(
        model,
        found,
        name="preview",
        device=torch.device("cpu"),
        dtype_policy=DtypePolicy(torch.float32, keep_fp8=False),
    )
    assert torch.equal(video(model.eval()), video(wanted))


def test_a_growing_layer_of_two_frames_keeps_the_later_one():
    state = decoder().state_dict()
    grow = state["decoder.7.conv.weight"]
    state["decoder.7.conv.weight"] = torch.cat((torch.zeros_like(grow), grow))
    assert torch.equal(decoder_state(state)["decoder.7.conv.weight"], grow)


def shapes_of(**changed):
    shapes = {n: tuple(p.shape) for n, p in TinyDecoder().state_dict().items()}
    return {n: s for n, s in (shapes | changed).items() if s is not None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder.1.weight": None}, "lacks decoder.1.weight"),
        ({"decoder.22.weight": (12, 64, 3, 3)}, r"first is decoder.22.weight .*\(12, 64, 3, 3\)"),
        ({"decoder.9.conv.0.bias": None}, "decoder.9.conv.0.bias with shape missing"),
        ({"decoder.1.weight": (256, 48, 3, 3)}, "latents of 48 channels"),
    ],
)
def test_other_models_are_refused(changed, message):
    with pytest.raises(WeightsError, match=message) as caught:
        config_from_shapes(shapes_of(**changed))
    assert caught.value.field == "decoder"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    wanted, got = video(decoder(dtype=torch.float32)), video(decoder(dtype=dtype))
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().mean() < 0.02
