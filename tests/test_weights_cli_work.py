"""`xicon-infer weights verify|lock|prepare|prune|inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.tiny import tiny_transformer_state
from tests.weights_cli_tools import by_id, isolate, put, run, run_json
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.weights.hub import Unreachable
from xicon_infer.weights.manifest import MANIFEST_NAME
from xicon_infer.weights_cli import main
from xicon_infer.weights_cli_work import Workers

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


def put_lora(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2)}, path)
    return path


# ---- verify


def test_verify_finds_faults_and_missing_files(capsys, tmp_path):
    good = put_lora(tmp_path / "loras" / by_id("lightx2v-i2v-480p-rank64-original").own_names[0])
    code, out = run(capsys, "verify", "--models-dir", tmp_path)
    assert code == 0
    assert f"unpinned lightx2v-i2v-480p-rank64-original{'':<0}" in out
    assert str(good) in out
    assert "1 files checked: 0 at fault, 0 missing" in out
    bad = put(tmp_path / "vae" / "Wan2.1_VAE.pth", "<html>")
    code, out = run(capsys, "verify", "--models-dir", tmp_path)
    assert code == 5
    assert f"{bad}: Wan2.1_VAE.pth is a web page" in out
    code, report = run_json(capsys, "verify", "nlf", "--models-dir", tmp_path)
    assert (code, report) == (5, {"files": [], "missing": ["nlf"]})


def test_verify_hashes_unless_told_not_to(capsys, tmp_path):
    entry = by_id("dwpose")
    path = put(tmp_path / "dwpose" / entry.path, "")
    with path.open("r+b") as file:
        file.write(b"\x08\x08")
        file.truncate(entry.size_bytes)
    words = ("verify", "dwpose", "--models-dir", tmp_path, "--jobs", "1")
    code, report = run_json(capsys, *words, "--quick")
    assert (code, report["files"][0]["state"]) == (0, "ok")
    code, report = run_json(capsys, *words)
    assert (code, report["files"][0]["state"]) == (5, "fault")
    assert entry.sha256 in report["files"][0]["text"]


def test_verify_with_nothing_there(capsys):
    assert run(capsys, "verify") == (
        0,
        "no file of the manifest was found; `xicon-infer weights list` says where it looks\n",
    )


# ---- lock


@dataclass(frozen=True)
class Remote:
    revision: str = "c" * 40
    size_bytes: int = 7
    sha256: str = "3" * 64
    refuse: str = ""

    def __call__(self, entry):
        if entry.id == self.refuse:
            raise WeightsError("gone")
        return self


def test_lock(capsys, tmp_path):
    output = tmp_path / "out.json"
    words = ("lock", "nlf", "rtmw3d", "--output", output, "--quiet")
    code, out = run(capsys, *words, workers=Workers(remote_file=Remote()))
    assert code == 0
    assert f"pinned     nlf: revision {'c' * 40}, bytes 7, sha256 {'3' * 64}" in out
    assert f"0 entries were up to date; {output} is written" in out
    changed = [
        now["id"]
        for now, then in zip(
            json.loads(output.read_text())["files"],
            json.loads((ROOT / MANIFEST_NAME).read_text())["files"],
            strict=True,
        )
        if now != then
    ]
    assert changed == ["nlf", "rtmw3d"]
    again = ("lock", "nlf", "--manifest", output)
    code, report = run_json(capsys, *again, workers=Workers(remote_file=Remote()))
    assert (code, report["files"][0]["before"]) == (0, report["files"][0]["after"])
    _, listed = run_json(capsys, "list", "nlf", "--manifest", output)
    assert listed["files"][0]["size_bytes"] == 7


def test_lock_reports_what_it_could_not_ask(capsys, tmp_path):
    words = ("lock", "nlf", "rtmw3d", "--output", tmp_path / "o.json", "--quiet")
    code, out = run(capsys, *words, workers=Workers(remote_file=Remote(refuse="nlf")))
    assert code == 5
    assert "not asked  nlf: gone" in out
    assert "pinned     rtmw3d" in out


def test_lock_without_a_network_ends_after_two_questions(capsys, tmp_path):
    asked = []

    def remote(entry):
        asked.append(entry.id)
        raise Unreachable(f"{entry.id}: the hub cannot be reached. Check the connection.")

    words = ["lock", "--output", str(tmp_path / "o.json"), "--quiet"]
    with pytest.raises(WeightsError, match=r"nobody can be reached, nothing was written: .*Check"):
        main(words, workers=Workers(remote_file=remote))
    assert len(asked) == 2
    assert not (tmp_path / "o.json").exists()


def test_lock_goes_on_where_one_server_of_several_answers(capsys, tmp_path):
    def remote(entry):
        if entry.id == "nlf":
            raise Unreachable("no")
        return Remote()

    words = ("lock", "nlf", "rtmw3d", "--output", tmp_path / "o.json", "--quiet")
    code, out = run(capsys, *words, workers=Workers(remote_file=remote))
    assert (code, "not asked  nlf: no" in out, "pinned     rtmw3d" in out) == (5, True, True)


def test_lock_offline_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("xicon_infer.weights.hub.is_offline", lambda: True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        main(["lock", "nlf", "--output", str(tmp_path / "o.json"), "--quiet"])


def test_lock_keeps_pinned_hashes(capsys, tmp_path):
    words = ["lock", "wan-vae", "--output", str(tmp_path / "o.json"), "--quiet"]
    with pytest.raises(WeightsError, match="what is published is not what is pinned"):
        main(words, workers=Workers(remote_file=Remote()))
    assert not (tmp_path / "o.json").exists()
    assert main([*words, "--update"], workers=Workers(remote_file=Remote())) == 0


# ---- prepare


@dataclass(frozen=True)
class Prepared:
    path: Path
    context_path: Path = Path("kv")
    content: str = "abc"


class Prepare:
    def __init__(self):
        self.calls = []

    def __call__(self, transformer, loras, output, *, storage, progress, overwrite):
        self.calls.append((transformer, list(loras), output, storage, overwrite))
        return Prepared(output)


def test_prepare_finds_files(capsys, tmp_path):
    prepare = Prepare()
    workers = Workers(prepare=prepare)
    entry, lora = by_id("scail-14b-fp8"), by_id("lightx2v-i2v-480p-rank64")
    there = put(tmp_path / entry.target)
    known = put(tmp_path / lora.target)
    mine = put(tmp_path / "loras" / "mine.safetensors")
    plain = put(tmp_path / "plain.safetensors")
    out = tmp_path / "fast.safetensors"
    common = ("--models-dir", tmp_path, "--output", out, "--quiet")
    loras = ("--lora", f"{lora.own_names[0]}:0.5", "--lora", "mine.safetensors")
    assert run(capsys, "prepare", "scail/fp8", *loras, *common, workers=workers)[0] == 0
    assert run(capsys, "prepare", plain, "--lora", f"{plain}:-1", *common, workers=workers)[0] == 0
    words = ("prepare", entry.id, "--storage", "bf16", "--overwrite", *common)
    _, report = run_json(capsys, *words, workers=workers)
    assert prepare.calls == [
        (there, [(known, 0.5), (mine, 1.0)], out, "fp8", False),
        (plain, [(plain, -1.0)], out, "fp8", False),
        (there, [], out, "bf16", True),
    ]
    assert report == {"path": str(out), "context_path": "kv", "content": "abc"}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["scail/bf16"], InvalidRequest, "no transformer of that name was found"),
        (["wan-vae"], InvalidRequest, "no transformer of that name was found"),
        (["nothing.safetensors"], InvalidRequest, "known are"),
        (
            ["{file}", "--lora", "gone.safetensors"],
            WeightsError,
            "'gone.safetensors' was not found",
        ),
        (["{file}", "--lora", "a:99"], InvalidRequest, "between -4 and 4"),
    ],
)
def test_prepare_refuses(tmp_path, words, error, message):
    file = put(tmp_path / "t.safetensors")
    words = [word.format(file=file) for word in words]
    with pytest.raises(error, match=message):
        main(["prepare", *words, "--output", "o"], workers=Workers(prepare=Prepare()))


# ---- prune


def test_prune_touches_only_what_pull_left(capsys, tmp_path):
    models = tmp_path / "models"
    keep = {
        "needed": put(models / by_id("wan-vae").target),
        "unknown": put(models / "Kijai" / "WanVideo_comfy" / "my_own.safetensors"),
        "another place": put(models / "vae" / "deep" / "Wan2_1_VAE_bf16.safetensors"),
        "part of something": put(models / "Kijai" / "notes.0123456789ab.part"),
        "odd part": put(models / "vae" / "Wan2.1_VAE.pth.part"),
    }
    other = by_id("wan-vae-comfy")
    surplus = [
        put(models / other.target, "1234"),
        put(models / (by_id("nlf").target + ".0123456789ab.part"), "12"),
    ]
    code, out = run(capsys, "prune", "--models-dir", models)
    assert code == 0
    assert f"{surplus[0]}: no preset that is kept needs wan-vae-comfy" in out
    assert f"{surplus[1]}: unfinished download" in out
    assert f"2 files, 6 B can be removed with --yes in {models}" in out
    assert all(path.exists() for path in surplus)
    code, report = run_json(capsys, "prune", "--models-dir", models, "--yes")
    assert [file["path"] for file in report["files"]] == [str(path) for path in surplus]
    assert report["removed"] is True
    assert not any(path.exists() for path in surplus)
    assert all(path.exists() for path in keep.values())
    assert "0 files, 0 B removed" in run(capsys, "prune", "--models-dir", models, "--yes")[1]


def test_prune_can_keep_less(capsys, tmp_path):
    vae = put(tmp_path / by_id("wan-vae").target)
    nlf = put(tmp_path / by_id("nlf").target)
    words = ("prune", "--models-dir", tmp_path)
    assert run_json(capsys, *words)[1]["files"] == []
    for sets, gone in ((["scail"], [nlf]), (["pose"], [vae]), (["scail", "pose"], [])):
        flags = [word for name in sets for word in ("--keep", name)]
        report = run_json(capsys, *words, *flags)[1]
        assert [file["path"] for file in report["files"]] == list(map(str, gone))
    assert vae.exists()
    assert nlf.exists()


def test_prune_leaves_links(capsys, tmp_path):
    other = by_id("wan-vae-comfy")
    far = put(tmp_path / "far.safetensors")
    link = tmp_path / "models" / other.target
    put(link.parent / "x")
    link.symlink_to(far)
    put(tmp_path / "models" / by_id("wan-vae").target)
    assert run_json(capsys, "prune", "--models-dir", tmp_path / "models")[1]["files"] == []


@pytest.mark.parametrize("mark", ["custom_nodes", "models/custom_nodes", "extra_model_paths.yaml"])
def test_prune_refuses_the_folder_of_a_comfyui(tmp_path, mark):
    other = put(tmp_path / "models" / by_id("wan-vae-comfy").target)
    put(tmp_path / "models" / by_id("wan-vae").target)
    put(tmp_path / mark / "x") if "." not in mark else put(tmp_path / mark)
    with pytest.raises(InvalidRequest, match="belongs to the ComfyUI"):
        main(["prune", "--yes", "--models-dir", str(tmp_path / "models")])
    assert other.exists()


def test_the_real_preparation_and_what_prune_says_of_it(capsys, tmp_path):
    source = tmp_path / "models" / "diffusion_models" / "tiny.safetensors"
    source.parent.mkdir(parents=True)
    save_file(tiny_transformer_state(), source)
    out = tmp_path / "models" / "fast" / "tiny-fast.safetensors"
    out.parent.mkdir()
    common = ("--models-dir", tmp_path / "models")
    code, text = run(capsys, "prepare", source, "--output", out, "--storage", "bf16", *common)
    kv = out.with_name("tiny-fast.kv.safetensors")
    assert code == 0
    assert str(out) in text
    assert str(kv) in text
    prune = ("prune", "--prepared", *common)
    assert run_json(capsys, *prune)[1]["files"] == []
    source.unlink()
    assert run_json(capsys, "prune", *common)[1]["files"] == []
    files = run_json(capsys, *prune, "--yes")[1]["files"]
    assert [(file["path"], file["reason"]) for file in files] == [
        (str(path), "prepared from tiny.safetensors, which is gone") for path in (out, kv)
    ]
    assert not out.exists()
    assert not kv.exists()


# ---- inspect


@dataclass(frozen=True)
class Inspection:
    path: Path
    shapes: dict
    usable: bool = True


class Inspect:
    def __init__(self, usable=True):
        self.calls = []
        self.usable = usable

    def __call__(self, path, *, check_finite):
        self.calls.append((path, check_finite))
        return Inspection(path, {"a": (1,)}, self.usable)


def fake_inspection(usable=True):
    work = Inspect(usable)
    return work, Workers(inspect_file=work, format_inspection=lambda found: f"is {found.path}")


def test_inspect(capsys):
    work, workers = fake_inspection()
    assert run(capsys, "inspect", "a", "b", workers=workers) == (0, "is a\n\nis b\n")
    code, report = run_json(capsys, "inspect", "a", "--check-finite", workers=workers)
    assert (code, report) == (0, [{"path": "a", "usable": True}])
    assert work.calls == [(Path("a"), False), (Path("b"), False), (Path("a"), True)]
    assert run(capsys, "inspect", "a", workers=fake_inspection(usable=False)[1])[0] == 5


def test_the_real_inspection(capsys, tmp_path):
    names = ("lora_down", "lora_up")
    tensors = {f"diffusion_model.blocks.0.self_attn.q.{n}.weight": torch.ones(4, 4) for n in names}
    save_file(tensors, tmp_path / "lora.bin")
    code, out = run(capsys, "inspect", tmp_path / "lora.bin")
    assert code == 0
    assert "safetensors" in out
    code, report = run_json(capsys, "inspect", tmp_path / "lora.bin")
    assert report[0]["detected"]["kind"] == "lora"
    with pytest.raises(WeightsError, match="no such file"):
        main(["inspect", str(tmp_path / "gone")])
