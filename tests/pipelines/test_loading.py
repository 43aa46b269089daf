"""Loading components: files under their published names, every refusal, tiny is deterministic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import build_pipeline, tiny
from pipelines.loading import LoadOptions, find_lora, load_preset, load_tiny
from pipelines.scail import ScailOptions
from tests.tiny_models import BF16_NAME, FP8_NAME, LORA_NAME, write_models
from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.ops.linear import Fp8Linear
from xicon_infer.pose.track import load_tracks, resample_track

TRACK = Path(__file__).parents[2] / "examples" / "dance_fullbody.npz"
OPTIONS = ScailOptions(width=64, height=64, num_inference_steps=2, seed=1)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("fp8"), fp8=True)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("bf16"), fp8=False)


def video(pipeline) -> np.ndarray:
    image = np.full((64, 64, 3), 90, np.uint8)
    image[10:50, 20:40] = 200
    track = resample_track(load_tracks(TRACK)[0], [0, 4, 8, 12, 16])
    return pipeline(image, [track], OPTIONS).clip.frames


@pytest.mark.parametrize(
    ("state", "name", "first"),
    [
        (tiny.tiny_transformer_state, "blocks.1.ffn.2.weight", [0.0452319, -0.0693991, -0.0292055]),
        (tiny.tiny_vae_state, "decoder.conv1.weight", [-0.0254016, -0.0804192, 0.0020376]),
        (tiny.tiny_text_state, "shared.weight", [-0.0685535, -0.0365653, -0.0644680]),
    ],
)
def test_tiny_weights_are_the_same_everywhere(state, name, first):
    """A changed number changes every tiny video: say so in the changelog."""
    tensor = state()[name]
    torch.testing.assert_close(tensor.flatten()[:3], torch.tensor(first), rtol=1e-4, atol=1e-5)


def test_published_files_run(fp8, bf16):
    results = {}
    for preset, folder in (("fp8", fp8), ("bf16", bf16)):
        pipeline = build_pipeline("scail", preset, LoadOptions(search_dirs=(folder,)))
        parts = pipeline.components
        assert parts.sources["transformer"].endswith(FP8_NAME if preset == "fp8" else BF16_NAME)
        count = sum(isinstance(m, Fp8Linear) for m in parts.transformer.modules())
        assert count == (24 if preset == "fp8" else 0)
        assert any("fp8" in note for note in parts.notes) == (preset == "fp8")
        results[preset] = video(pipeline).astype(int)
    assert results["fp8"].shape == (5, 64, 64, 3)
    difference = abs(results["fp8"] - results["bf16"]).mean()
    assert 0 < difference < 25, "fp8 is a rounded bf16, not another model"


def test_half_precision_runs_on_the_cpu(bf16):
    options = LoadOptions(search_dirs=(bf16,), dtype=torch.bfloat16)
    parts = load_preset("scail", "bf16", options)
    assert parts.transformer.dtype is torch.bfloat16
    assert parts.transformer.patch_embedding.weight.dtype is torch.float32
    half = load_preset("scail", "bf16", replace(options, dtype=torch.float16))
    assert half.transformer.dtype is torch.float16
    assert next(half.text_encoder.parameters()).dtype is torch.bfloat16


def test_loras_change_the_result_and_are_reported(bf16):
    plain = LoadOptions(search_dirs=(bf16,))
    base = video(build_pipeline("scail", "bf16", plain))
    for mode in ("full", "merge"):
        options = replace(plain, loras=((LORA_NAME, 1.0),), lora_mode=mode)
        changed = video(build_pipeline("scail", "bf16", options))
        assert (changed != base).any(), mode
    off = replace(plain, loras=((LORA_NAME, 0.0),))
    np.testing.assert_array_equal(video(build_pipeline("scail", "bf16", off)), base)


def test_a_lora_is_found_by_name_or_path(bf16, tmp_path):
    assert find_lora(LORA_NAME, (tmp_path, bf16)) == bf16 / LORA_NAME
    assert find_lora(str(bf16 / LORA_NAME), ()) == bf16 / LORA_NAME
    with pytest.raises(WeightsError, match=r"'nope' was not found \(searched: no folder\)"):
        find_lora("nope", ())


def test_every_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError) as caught:
        load_preset("scail", "fp8", LoadOptions(search_dirs=(tmp_path,)))
    text = str(caught.value)
    for word in (FP8_NAME, "Wan2.1_VAE.pth", "umt5", "tokenizer", "clip_vision_h", "--models-dir"):
        assert word in text
    assert str(tmp_path) in text


def test_another_model_is_refused(bf16, tmp_path):
    folder = write_models(tmp_path / "models", fp8=False)
    state = load_file(folder / BF16_NAME)
    del state["model.diffusion_model.patch_embedding_pose.weight"]
    del state["model.diffusion_model.patch_embedding_pose.bias"]
    save_file(state, folder / BF16_NAME)
    with pytest.raises(WeightsError, match=r"image-to-video .*, where a SCAIL transformer is"):
        load_preset("scail", "bf16", LoadOptions(search_dirs=(folder,)))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_wrong_tensor_is_named(tmp_path, change):
    folder = write_models(tmp_path / "models", fp8=False)
    state = load_file(folder / BF16_NAME)
    name = "model.diffusion_model.blocks.1.ffn.2.weight"
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:, :-1].contiguous()
    else:
        state["model.diffusion_model.blocks.1.ffn.7.weight"] = state[name].clone()
    save_file(state, folder / BF16_NAME)
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn\.[27]\.weight"):
        load_preset("scail", "bf16", LoadOptions(search_dirs=(folder,)))


def test_a_forced_kernel_that_is_absent_is_refused():
    parts = load_tiny("scail", LoadOptions(attention="flash3"))
    with pytest.raises(BackendUnavailable, match="flash3"):
        _ = parts.transformer.backend


def test_unknown_pipelines_and_presets_are_refused():
    with pytest.raises(InvalidRequest, match=r"'pipeline' must be one of .*wan_t2v, got 'wan'"):
        build_pipeline("wan")
    with pytest.raises(InvalidRequest, match="preset"):
        build_pipeline("scail", "fp4")
