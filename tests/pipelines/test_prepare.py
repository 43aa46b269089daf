"""Preparing a transformer: what the files hold, and that the same inputs give the same bytes."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.prepare import prepare
from pipelines.prepared import PREPARED, is_context_name, open_transformer
from pipelines.storage import apply_storage
from tests.pipelines.storage_models import (
    I2V,
    SCAIL,
    T2V,
    drift,
    load_model,
    lora_file,
    lora_tensors,
    published_state,
    same,
    snapshot_of,
    velocity,
)
from xicon_infer.errors import Cancelled, InvalidRequest
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.steady_dancer import SteadyDancerTransformer
from xicon_infer.models.wan import WanTransformer
from xicon_infer.types import SilentProgress
from xicon_infer.weights.checkpoint import read_tensors

CPU = torch.device("cpu")
FILE = published_state()


class Counting(SilentProgress):
    """Keeps the steps; may stop the work at one of them."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.steps, self.stop_at = [], stop_at

    def step(self, done, total, unit="step"):
        self.steps.append((done, total, unit))
        if done == self.stop_at:
            raise Cancelled("stopped")


@pytest.fixture
def source(tmp_path):
    save_file(FILE, tmp_path / "model.safetensors")
    save_file(lora_tensors(load_model(FILE).state_dict()), tmp_path / "lora.safetensors")
    return tmp_path


def run(folder, *, loras=(("lora.safetensors", 0.8),), name="fast", storage="fp8", **options):
    source = options.pop("source", "model.safetensors")
    return prepare(
        folder / source,
        [(folder / lora, strength) for lora, strength in loras],
        folder / f"{name}.safetensors",
        storage=storage,
        progress=options.pop("progress", SilentProgress()),
        **options,
    )


def loaded(path, config=I2V, **options):
    return load_model(read_tensors(open_transformer(path)), config, **options)


@pytest.mark.parametrize(("storage", "mode"), [("fp8", "merged-fp8"), ("bf16", "merged-bf16")])
def test_a_prepared_file_is_the_merged_storage(source, storage, mode):
    """The same weights as merging when the model is loaded; nothing is left to do.

    Biases differ by one rounding: loading a float16 file for bfloat16 rounds them before a LoRA
    is added, preparing after.
    """
    about = run(source, storage=storage)
    model = loaded(about.path, compute=torch.bfloat16)
    merged = load_model(FILE, compute=torch.bfloat16)
    lora = lora_file(load_model(FILE).state_dict(), "lora.safetensors")
    report = apply_storage(merged, mode, [(lora, 0.8)], matmul="dequant", device=CPU)
    first, second = model.state_dict(), merged.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        if name.startswith("blocks.") and name.endswith("weight") and value.ndim == 2:
            assert same({"": snapshot_of(value)}, {"": snapshot_of(second[name])}), name
        torch.testing.assert_close(value.float(), second[name].float(), rtol=1e-2, atol=1e-3)
    # Below what bfloat16 costs this model itself.
    assert drift(velocity(model), velocity(merged)) < 1e-2
    assert {n for n in report.guarded if n.startswith("blocks.")} == set(about.guarded)
    assert drift(velocity(model), velocity(load_model(FILE))) > 0.05


def test_without_loras_fp8_keeps_its_bytes(source):
    run(source, loras=())
    made = read_tensors(open_transformer(source / "fast.safetensors"))
    name = "blocks.2.ffn.0.weight"
    assert torch.equal(made[name].view(torch.uint8), FILE[name].view(torch.uint8))
    scale = made["blocks.2.ffn.0.scale_weight"]
    assert scale.shape == (96, 1)
    assert torch.equal(scale, FILE["blocks.2.ffn.0.scale_weight"].expand(96, 1))
    assert made["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    assert made["blocks.2.norm3.weight"].dtype == torch.float16


def test_what_lies_in_which_file_in_which_order(source):
    about = run(source)
    headers = [header(path) for path in (about.path, about.context_path)]
    main, context = (
        sorted((n for n in h if n != "__metadata__"), key=lambda n, h=h: h[n]["data_offsets"])
        for h in headers
    )
    assert all(is_context_name(name) for name in context)
    assert not any(is_context_name(name) for name in main)
    parts = {name.split(".")[3] for name in context}
    assert parts == {"k", "v", "k_img", "v_img", "norm_k", "norm_k_img"}
    assert main[0].startswith("patch_embedding")
    assert main[-1].startswith("head")
    blocks = [int(n.split(".")[1]) for n in main if n.startswith("blocks.")]
    assert blocks == sorted(blocks)
    inside = [n.removeprefix("blocks.2.") for n in main if n.startswith("blocks.2.")]
    order = list(dict.fromkeys(name.rpartition(".")[0] or name for name in inside))
    assert order == [
        *("modulation", "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.norm_q"),
        *("self_attn.norm_k", "self_attn.o", "norm3", "cross_attn.q", "cross_attn.norm_q"),
        *("cross_attn.o", "ffn.0", "ffn.2"),
    ]
    for path, found in zip((about.path, about.context_path), headers, strict=True):
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert start % 4096 == 0
        sizes = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
        for name, entry in found.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0
        assert load_file(path).keys() == found.keys() - {"__metadata__"}


def header(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_same_inputs_same_bytes(source):
    first, second = run(source), run(source, name="again")
    assert first.content == second.content
    for a, b in ((first.path, second.path), (first.context_path, second.context_path)):
        assert a.read_bytes() == b.read_bytes()


def test_every_input_changes_the_hash(source):
    found = {run(source).content}
    save_file(FILE, source / "renamed.safetensors")
    other = {**FILE, "head.modulation": FILE["head.modulation"] + 1}
    save_file(other, source / "other.safetensors")
    for index, options in enumerate(
        (
            {"storage": "bf16"},
            {"loras": [("lora.safetensors", 0.7)]},
            {"loras": []},
            {"source": "renamed.safetensors"},
            {"source": "other.safetensors"},
        )
    ):
        found.add(run(source, name=f"variant{index}", **options).content)
    assert len(found) == 6


def test_description(source):
    about = run(source, loras=[("lora.safetensors", 0.8), ("lora.safetensors", 0.0)])
    assert about.transformer == {
        "name": "model.safetensors",
        "bytes": (source / "model.safetensors").stat().st_size,
    }
    (lora,) = about.loras
    assert (lora["name"], lora["strength"]) == ("lora.safetensors", 0.8)
    assert len(lora["sha256"]) == len(about.content) == 64
    assert (about.kind, about.storage) == ("wan_i2v", "fp8")
    assert about.context_path.name == "fast.kv.safetensors"
    kept = json.loads(header(about.path)["__metadata__"][PREPARED])
    assert kept["version"] == 1


def test_progress_and_warnings(source):
    strange = lora_tensors(load_model(FILE).state_dict())
    strange["blocks.77.ffn.0.diff_b"] = torch.ones(3)
    save_file(strange, source / "strange.safetensors")
    progress = Counting()
    run(source, loras=[("strange.safetensors", 1.0)], progress=progress)
    count = len(load_model(FILE, compute=torch.float32).state_dict()) - 12 * I2V.num_layers
    assert progress.steps[0] == (1, count, "tensor")
    assert progress.steps[-1] == (count, count, "tensor")
    (warning,) = progress.warnings
    assert "blocks.77.ffn.0.bias" in warning


@pytest.mark.parametrize("existing", [False, True])
def test_a_stop_half_way_leaves_no_trace(source, existing):
    before = sorted(source.iterdir())
    if existing:
        old = run(source)
        before = sorted(source.iterdir())
    with pytest.raises(Cancelled):
        run(source, loras=(), progress=Counting(stop_at=40), overwrite=True)
    assert sorted(source.iterdir()) == before
    if existing:
        assert open_transformer(old.path).metadata == open_transformer(old.path).metadata
        loaded(old.path)


def test_overwriting_is_asked_for(source):
    first = run(source)
    with pytest.raises(InvalidRequest, match=r"fast\.safetensors is there already"):
        run(source, loras=())
    first.path.unlink()
    with pytest.raises(InvalidRequest, match=r"fast\.kv\.safetensors is there already"):
        run(source, loras=())
    second = run(source, loras=(), overwrite=True)
    assert second.content != first.content
    loaded(second.path)


def test_inputs_are_never_overwritten(source):
    for name in ("model", "lora"):
        with pytest.raises(InvalidRequest, match="is one of the inputs"):
            run(source, name=name, overwrite=True)
    assert load_file(source / "model.safetensors").keys() == FILE.keys()


@pytest.mark.parametrize(
    ("build", "config", "kind"),
    [
        (ScailTransformer, SCAIL, "scail"),
        (SteadyDancerTransformer, I2V, "steady_dancer"),
        (WanTransformer, T2V, "wan_t2v"),
    ],
)
def test_every_model(tmp_path, build, config, kind):
    state = published_state(config, build=build)
    save_file(state, tmp_path / "model.safetensors")
    about = run(tmp_path, loras=())
    assert about.kind == kind
    model, plain = (
        load_model(found, config, build=build)
        for found in (read_tensors(open_transformer(about.path)), state)
    )
    if kind == "wan_t2v":
        assert drift(velocity(model), velocity(plain)) < 1e-2
    assert set(model.state_dict()) == set(plain.state_dict()) - {
        name.removesuffix("weight") + "scale_weight" for name in about.guarded
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that still live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.now += storage.nbytes()
                    weakref.finalize(tensor, self.drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def drop(self, count):
        self.now -= count


@pytest.mark.parametrize("storage", ["fp8", "bf16"])
def test_memory_is_that_of_one_layer_whatever_the_depth(tmp_path, storage):
    peaks = {}
    for depth in (3, 9):
        folder = tmp_path / str(depth)
        folder.mkdir()
        config = replace(T2V, num_layers=depth)
        state = published_state(config)
        save_file(state, folder / "model.safetensors")
        save_file(lora_tensors(load_model(state, config).state_dict()), folder / "lora.safetensors")
        with LiveBytes() as live:
            run(folder, storage=storage)
        peaks[depth] = live.peak
    wide = 4 * (8 * 64 * 64 + 2 * 64 * 96)  # one block in float32
    assert peaks[9] - peaks[3] < wide, "six more blocks cost less than one in float32"
