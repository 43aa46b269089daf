"""Every preset from its files, other LoRAs on a loaded model, and prepared files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.components import Components
from pipelines.loading import KINDS, LoadOptions, load_preset, set_loras
from pipelines.prepare import prepare
from tests.every_preset import CASES, write_preset
from tests.tiny_models import LORA_NAME
from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import Fp8Linear
from xicon_infer.types import SilentProgress
from xicon_infer.weights.manifest import files_for

DISTILL = ((LORA_NAME, 1.0),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    return {case: write_preset(tmp_path_factory.mktemp("-".join(case)), *case) for case in CASES}


def velocity(parts: Components) -> torch.Tensor:
    """Returns what the transformer predicts for fixed inputs, as a plain Wan model."""
    model = parts.transformer
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(5, config.text_dim, generator=generator)]
    image = None
    if config.image_dim is not None:
        tokens = config.image_positions or 17
        image = torch.randn(1, tokens, config.image_dim, generator=generator)
    latents = torch.randn(1, config.in_dim, 2, 4, 4, generator=generator)
    with torch.inference_mode(), parts.projecting():
        context = model.encode_context(text, image)
    with torch.inference_mode(), parts.sampling():
        if type(model).__name__ == "ScailTransformer":
            return model(latents[:, :16], torch.tensor([500.0]), context)
        split = (
            (latents[:, :16], None) if config.in_dim == 16 else (latents[:, :16], latents[:, 16:])
        )
        return model(split[0], torch.tensor([500.0]), context, split[1])


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_every_preset_loads_from_its_files_alone(folders, case):
    pipeline, preset = case
    parts = load_preset(pipeline, preset, LoadOptions(search_dirs=(folders[case],)))
    names = {entry.component for entry in files_for(pipeline, preset)} - {"lora"}
    assert set(parts.sources) == names
    assert (parts.image_encoder is None) == (pipeline == "wan_t2v")
    assert velocity(parts).isfinite().all()
    fp8 = sum(isinstance(m, Fp8Linear) for m in parts.transformer.modules())
    gguf = parts.sources["transformer"].endswith(".gguf")
    assert bool(fp8) == ("fp8" in Path(parts.sources["transformer"]).name and not gguf)
    assert parts.facts["storage"]["fp8_layers"] == fp8


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_the_lora_of_every_pipeline_fits(folders, case):
    pipeline, preset = case
    loras = [e for e in files_for(pipeline, preset) if e.component == "lora"]
    if not loras:
        assert preset == "1.3b"
        return
    options = LoadOptions(search_dirs=(folders[case],))
    plain = load_preset(pipeline, preset, options)
    before = velocity(plain)
    set_loras(plain, replace(options, loras=((loras[0].names[0], 1.0),)))
    assert not torch.equal(velocity(plain), before)
    set_loras(plain, options)
    assert torch.equal(velocity(plain), before)


@pytest.mark.parametrize(("wrong", "right"), [("wan_i2v", "scail"), ("wan_i2v", "steady_dancer")])
def test_a_plain_model_is_refused_by_name(folders, tmp_path, wrong, right):
    source = folders[(wrong, "bf16")]
    entry = next(e for e in files_for(wrong, "bf16") if e.component == "transformer")
    options = LoadOptions(
        search_dirs=(folders[(right, "bf16")],), transformer=source / entry.target
    )
    with pytest.raises(WeightsError, match="transformer is needed") as caught:
        load_preset(right, "bf16", options)
    assert entry.target.split("/")[-1] in caught.value.message


def test_kinds_are_those_of_the_pipelines():
    assert {name for name, _ in CASES} == set(KINDS)


@pytest.mark.parametrize("storage", ["merged-bf16", "merged-fp8"])
def test_storages_are_close_to_the_file(folders, storage):
    options = LoadOptions(search_dirs=(folders[("scail", "fp8")],), loras=DISTILL)
    expected = velocity(load_preset("scail", "fp8", options))
    parts = load_preset("scail", "fp8", replace(options, storage=storage, matmul="dequant"))
    found = velocity(parts)
    assert parts.facts["storage"]["storage"] == storage
    assert not torch.equal(found, expected)
    assert ((found - expected).norm() / expected.norm()).item() < 0.04


def test_a_prepared_model_runs_without_its_sources(folders, tmp_path):
    folder = folders[("scail", "fp8")]
    options = LoadOptions(search_dirs=(folder,), loras=DISTILL)
    before = load_preset("scail", "fp8", options)
    source = Path(before.sources["transformer"])
    lora = next(folder.rglob(LORA_NAME))
    made = prepare(
        source,
        [(lora, 1.0)],
        tmp_path / "fast.safetensors",
        storage="fp8",
        progress=SilentProgress(),
    )
    fast = load_preset("scail", "fp8", replace(options, transformer=made.path))
    assert fast.facts["merged_loras"] == {LORA_NAME: 1.0}
    assert fast.facts["storage"]["loras"] == [], "the LoRA is inside and not put on again"
    expected, found = velocity(before), velocity(fast)
    assert ((found - expected).norm() / expected.norm()).item() < 0.04
    with pytest.raises(WeightsError, match=r"strength 1 and cannot be changed to 0\.5"):
        load_preset(
            "scail", "fp8", replace(options, transformer=made.path, loras=((LORA_NAME, 0.5),))
        )
    made.context_path.unlink()
    with pytest.raises(WeightsError, match=r"fast\.kv\.safetensors is missing"):
        load_preset("scail", "fp8", replace(options, transformer=made.path))
