"""Every golden file that travels with the tests, and the tool that replays them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.__main__ import golden_files, main, replay
from tests.parity.target import KINDS, Target

GOLDEN = Path(__file__).parent / "golden"
FILES = golden_files([GOLDEN])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_golden_file_is_met(path):
    checks = replay(path, [GOLDEN])
    assert checks
    assert [check for check in checks if not check.ok] == []


def changed_copy(source: Path, folder: Path, key: str) -> Path:
    """Returns a copy of a golden in which one tensor is off by a thousandth."""
    target = folder / source.name
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    tensors[key] = tensors[key] * 1.001
    save_file(tensors, target, metadata=meta)
    return target


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("wan_core/wan_t2v_tiny.safetensors", "out.velocity"),
        ("wan_core/wan_t2v_tiny.safetensors", "mid.block1"),
        ("scail/scail_dit_hd32.safetensors", "out.official"),
        ("scail/scail_dit_hd32.safetensors", "mid.rope_wrapper"),
        ("wan_core/vae_tiny.safetensors", "out.decode"),
        ("wan_core/umt5_tiny.safetensors", "out.hidden"),
        ("wan_core/scheduler_trajectories.safetensors", "case04.out.x_after_step"),
        ("wan_core/lora_merge.safetensors", "case0.out.merged.blocks.0.ffn.0.weight"),
    ],
)
def test_a_changed_output_fails(tmp_path, capsys, name, key):
    changed_copy(GOLDEN / name, tmp_path, key)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "0 FAIL" not in out


def test_changed_names_of_a_real_model_fail(tmp_path, capsys):
    keys = json.loads((GOLDEN / "keys" / "scail_14b_keys.json").read_text())
    keys["blocks.3.ffn.9.weight"] = [5120]
    (tmp_path / "other.json").write_text(json.dumps(keys))
    assert main([str(tmp_path)]) == 1
    assert "1306 names and shapes" in capsys.readouterr().out


def test_readmes_are_passed_over_and_unknown_files_are_skips(tmp_path, capsys):
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    shutil.copy(GOLDEN / "scail" / "scail_sigmas.json", deep / "renamed.json")
    np.savez(tmp_path / "unknown.npz", thing=np.zeros(3))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "README" not in out
    assert "renamed" in out
    assert "unknown.npz" in out
    assert out.splitlines()[-1].endswith("1 SKIP")


def test_a_broken_file_is_a_failure_with_a_reason(tmp_path, capsys):
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    assert main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_nothing_to_replay_is_said(tmp_path, capsys):
    assert main([]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    assert "not found" in capsys.readouterr().out


NETWORKS = [
    "wan_core/wan_i2v_tiny.safetensors",
    "scail/scail_dit_hd32.safetensors",
    "steady_dancer/dancer_model_forward.safetensors",
    "wan_core/umt5_tiny.safetensors",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_reach_the_class_of_their_arithmetic(name):
    worst = {}
    for kind in KINDS:
        checks = replay(GOLDEN / name, [GOLDEN], Target(torch.device("cpu"), kind))
        assert [check for check in checks if not check.ok] == []
        worst[kind] = max(check.rel_err for check in checks)
    # The numbers differ: each kind of arithmetic really ran. Encoders are never run in fp8.
    assert worst["fp32"] < 1e-4 < 1e-3 < worst["bf16"]
    assert (worst["fp8"] == worst["bf16"]) == ("umt5" in name)
    assert worst["fp8"] >= worst["bf16"]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_wrong_network_fails_its_class_too(tmp_path, kind):
    source = GOLDEN / "wan_core" / "wan_t2v_tiny.safetensors"
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    tensors["weights.blocks.1.ffn.2.weight"] *= 1.3
    save_file(tensors, tmp_path / source.name, metadata=meta)
    checks = replay(tmp_path / source.name, [tmp_path], Target(torch.device("cpu"), kind))
    assert not all(check.ok for check in checks)


def test_what_has_no_network_keeps_its_tolerance():
    target = Target(torch.device("cpu"), "bf16")
    for name in ("wan_core/scheduler_trajectories.safetensors", "scail/scail_sigmas.json"):
        assert replay(GOLDEN / name, [GOLDEN], target) == replay(GOLDEN / name, [GOLDEN])


def test_comparisons_are_written_as_json(tmp_path, capsys):
    words = ["--dtype", "bf16", "--networks", "--json", str(tmp_path / "checks.json")]
    assert main([*words, str(GOLDEN / "scail")]) == 0
    told = json.loads((tmp_path / "checks.json").read_text())
    assert (told["dtype"], told["device"]) == ("bf16", "cpu")
    assert told["counts"]["ok"] == len(told["checks"]) > 20
    assert "scail_sigmas" not in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda", str(GOLDEN / "scail")]) == 2
    assert "sees no GPU" in capsys.readouterr().out
