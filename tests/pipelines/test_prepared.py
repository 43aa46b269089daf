"""Prepared transformers: every kind of source, the pair of files, context weights set aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.prepare import prepare
from pipelines.prepared import (
    PREPARED,
    context_weights_aside,
    describe,
    open_transformer,
    put_context_weights,
    take_context_weights,
)
from tests.parity.golden import Golden
from tests.pipelines.storage_models import (
    I2V,
    SCAIL,
    drift,
    load_model,
    lora_tensors,
    published_state,
    same,
    snapshot,
    snapshot_of,
    velocity,
)
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.types import SilentProgress
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.keymaps import wan_names

TESTS = Path(__file__).parents[1]
FILE = published_state()
WIDE = published_state(fp8=False)


def run(folder, source="model.safetensors", *, storage="fp8", name="fast", loras=(), **options):
    return prepare(
        folder / source,
        [(folder / lora, 1.0) for lora in loras],
        folder / f"{name}.safetensors",
        storage=storage,
        progress=SilentProgress(),
        **options,
    )


def loaded(path, config=I2V, **options):
    return load_model(read_tensors(open_transformer(path)), config, **options)


def as_plain_fp8(state):
    return {
        n: v.float().to(torch.float8_e5m2) if v.dtype == torch.float8_e4m3fn else v
        for n, v in state.items()
        if not n.endswith(("scale_weight", "scaled_fp8"))
    }


def as_diffusers(state):
    renames = json.loads((TESTS / "models" / "diffusers_names.json").read_text())
    made = {}
    for name, value in state.items():
        for old, new in renames:
            name = name.replace(old, new)
        made[name] = value
    return made


def as_sat(state, layers):
    """Returns a SCAIL file under the names of its authors, rows of q, k and v in one tensor."""
    golden = Golden(TESTS / "golden" / "scail" / "scail_sat_to_wan_keys.safetensors", [])
    made = {}
    for first in golden.under("sat."):
        for index in range(layers):
            name = re.sub(r"(layers|list|modulations)\.0", rf"\1.{index}", first)
            parts = [state[target] for target in wan_names(name, "sat")]
            made[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return made


SOURCES = {
    "bf16": lambda: {n: v.bfloat16() for n, v in published_state(fp8=False).items()},
    "float32 with prefix": lambda: {
        f"model.diffusion_model.{n}": v for n, v in published_state(fp8=False).items()
    },
    "diffusers": lambda: as_diffusers(WIDE),
    "scaled fp8": published_state,
    "scale per row": lambda: {
        n.replace("scale_weight", "weight_scale"): v.expand(
            FILE[n.replace("scale_weight", "weight")].shape[0]
        )[:, None].contiguous()
        if n.endswith("scale_weight")
        else v
        for n, v in FILE.items()
        if n != "scaled_fp8"
    },
    "plain e5m2": lambda: as_plain_fp8(published_state()),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("storage", ["fp8", "bf16"])
def test_every_source(tmp_path, name, storage):
    state = SOURCES[name]()
    save_file(state, tmp_path / "model.safetensors")
    about = run(tmp_path, loras=(), storage=storage)
    expected = velocity(load_model(state))
    limit = 1e-2 if storage == "bf16" else 4e-2
    assert drift(velocity(loaded(about.path)), expected) < limit


def test_gguf_source(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "wan")
    state = published_state(fp8=False)
    for name, value in state.items():
        if name.startswith("patch_embedding") and value.ndim == 5:
            dims = ",".join(map(str, value.shape))
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(d) for d in dims.split(",")])
            value = value.flatten(2)
        if name.startswith("blocks.") and value.ndim == 2:
            packed = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    about = run(tmp_path, loras=(), source="model.gguf")
    assert drift(velocity(loaded(about.path)), velocity(load_model(state))) < 4e-2


@pytest.mark.parametrize("storage", ["fp8", "bf16"])
@pytest.mark.parametrize("form", ["torch", "shards", "sat"])
def test_other_forms_give_the_same_tensors(tmp_path, form, storage):
    """Nothing but the name and size of the source differs."""
    build = {"build": ScailTransformer} if form == "sat" else {}
    config = SCAIL if form == "sat" else I2V
    state = published_state(config, fp8=False, **build)
    save_file(state, tmp_path / "model.safetensors")
    source = "model.pth"
    if form == "shards":
        halves = [dict(list(state.items())[i::2]) for i in range(2)]
        for index, half in enumerate(halves):
            save_file(half, tmp_path / f"part{index}.safetensors")
        weight_map = {n: f"part{i}.safetensors" for i, half in enumerate(halves) for n in half}
        source = "sharded.safetensors.index.json"
        (tmp_path / source).write_text(json.dumps({"weight_map": weight_map}))
    elif form == "sat":
        torch.save({"module": as_sat(state, config.num_layers)}, tmp_path / source)
    else:
        torch.save(state, tmp_path / source)
    lora = lora_tensors(load_model(state, config, **build).state_dict())
    save_file(lora, tmp_path / "lora.safetensors")
    first = run(tmp_path, storage=storage, loras=["lora.safetensors"])
    second = run(tmp_path, source, storage=storage, loras=["lora.safetensors"], name="other")
    a, b = (read_tensors(open_transformer(about.path)) for about in (first, second))
    assert list(a) == list(b)
    assert all(same({"": snapshot_of(a[n])}, {"": snapshot_of(b[n])}) for n in a)
    assert first.guarded == second.guarded
    assert second.transformer["bytes"] > 1e5


@pytest.fixture
def pair(tmp_path):
    save_file(FILE, tmp_path / "model.safetensors")
    return run(tmp_path)


def test_a_missing_second_file_is_named(pair):
    pair.context_path.unlink()
    with pytest.raises(WeightsError, match=r"second file fast\.kv\.safetensors is missing"):
        open_transformer(pair.path)


def test_files_of_two_runs_do_not_mix(pair, tmp_path):
    other = run(tmp_path, name="other", storage="bf16")
    other.context_path.replace(pair.context_path)
    with pytest.raises(WeightsError, match=r"was not made together with fast\.safetensors"):
        open_transformer(pair.path)
    save_file({"x": torch.ones(1)}, pair.context_path)
    with pytest.raises(WeightsError, match="was not made together"):
        open_transformer(pair.path)


def test_the_second_file_alone_is_refused(pair):
    with pytest.raises(WeightsError, match=r"name the first, fast\.safetensors"):
        open_transformer(pair.context_path)


def test_both_files_may_be_renamed_together(pair, tmp_path):
    pair.path.rename(tmp_path / "new.safetensors")
    pair.context_path.rename(tmp_path / "new.kv.safetensors")
    assert describe(open_transformer(tmp_path / "new.safetensors")).content == pair.content


def test_other_files_open_as_ever(tmp_path):
    save_file(FILE, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    assert open_transformer(path) == open_checkpoint(path)
    assert describe(open_checkpoint(path)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "unreadable description"),
        ("[]", "unreadable description"),
        ("{}", "unreadable description"),
        ('{"version": 2}', "prepared in format 2, this program reads 1"),
        ('{"version": 1, "part": "main"}', "lacks content, guarded, kind"),
    ],
)
def test_damaged_descriptions(tmp_path, text, message):
    save_file(FILE, tmp_path / "model.safetensors", metadata={PREPARED: text})
    with pytest.raises(WeightsError, match=message):
        open_transformer(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.3.ffn.0.bias"), r"1 missing: blocks\.3\.ffn\.0\.bias"),
        (lambda s: s.update(extra=torch.ones(2)), "1 unexpected: extra"),
        (
            lambda s: s.update({"blocks.1.norm3.weight": torch.ones(3)}),
            r"1 of a wrong shape: blocks\.1\.norm3\.weight",
        ),
        (
            lambda s: s.update({"blocks.1.norm3.weight": torch.full((64,), torch.nan)}),
            r"NaN or infinity: blocks\.1\.norm3\.weight",
        ),
        (
            lambda s: s.update({"blocks.1.ffn.0.scale_weight": torch.zeros(())}),
            "scales that are zero",
        ),
    ],
)
def test_sources_that_do_not_fit(tmp_path, change, message):
    state = dict(FILE)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_options_are_checked(pair, tmp_path):
    with pytest.raises(InvalidRequest, match="prepared already"):
        run(tmp_path, "fast.safetensors", name="twice")
    with pytest.raises(InvalidRequest, match="got 'int8', allowed are fp8, bf16"):
        run(tmp_path, storage="int8", name="new")
    progress = SilentProgress()
    source = tmp_path / "model.safetensors"
    with pytest.raises(InvalidRequest, match=r"must end with \.safetensors"):
        prepare(source, [], tmp_path / "a.pth", storage="fp8", progress=progress)
    with pytest.raises(InvalidRequest, match="strength must be a number"):
        out = tmp_path / "a.safetensors"
        prepare(source, [(source, float("nan"))], out, storage="fp8", progress=progress)
    with pytest.raises(WeightsError, match=r"nowhere: .* cannot be written"):
        out = tmp_path / "nowhere" / "a.safetensors"
        prepare(source, [], out, storage="fp8", progress=progress)


def test_only_transformers_are_prepared(tmp_path):
    save_file(lora_tensors(WIDE), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="is a lora file; only transformers"):
        run(tmp_path)


def test_context_weights_set_aside(pair):
    """Without them the model moves, is counted and predicts; with them it encodes as before."""
    model = loaded(pair.path)
    before, expected = snapshot(model), velocity(model)
    context = model.encode_context([torch.ones(4, 32)], torch.ones(1, 5, 32))
    call = (torch.ones(1, 16, 2, 4, 4), torch.tensor([5.0]), context, torch.ones(1, 20, 2, 4, 4))
    with torch.no_grad():
        predicted = model(*call)
        with context_weights_aside(model):
            names = set(dict(model.named_parameters()))
            assert not any(re.search(r"cross_attn\.(norm_)?(k|v)(_img)?\.", n) for n in names)
            model.to("cpu")
            assert torch.equal(model(*call), predicted)
            with pytest.raises(AttributeError):
                model.encode_context([torch.ones(4, 32)], torch.ones(1, 5, 32))
    assert same(snapshot(model), before)
    assert torch.equal(velocity(model), expected)
    taken = take_context_weights(model)
    assert sum(len(parts) for parts in taken) == 6 * I2V.num_layers
    put_context_weights(model, taken)
    assert same(snapshot(model), before)
