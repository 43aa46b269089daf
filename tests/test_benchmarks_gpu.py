"""The GPU benchmarks: every candidate runs at tiny size, and the arithmetic behind the figures."""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from math import isclose

import pytest
import torch

from benchmarks import ceilings, dit, dit_worker, gpu_suite, machine
from benchmarks.dit_models import (
    CANDIDATES,
    GRIDS,
    TINY_SHAPE,
    build_candidate,
    build_diffusers,
    build_ours,
    candidate,
)
from benchmarks.dit_process import Process, WorkerFailed
from benchmarks.dit_switches import switches
from xicon_infer.formulas import Ceiling, floor_seconds, forward_flops

RUNNABLE = [
    name
    for name, each in CANDIDATES.items()
    if each.kernels == "eager" and all(find_spec(package) for package in each.needs)
]
"""Here: Triton's kernels need a GPU."""

ARGS = argparse.Namespace(device="cpu", layers=2, tiny=True, turns=3, rounds=2)


def run(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


@pytest.fixture(scope="module")
def errors():
    """Relative error of each candidate on the tiny slice."""
    found = {}
    with torch.inference_mode():
        for name in RUNNABLE:
            args = argparse.Namespace(**vars(ARGS) | {"candidate": name})
            found[name] = dit_worker.slice_error(args)
    return found


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_candidate_runs_and_is_near_float32(name, errors):
    assert 0 < errors[name] < 0.1
    assert candidate(name).fp8_products == name.startswith("O3")


def test_each_way_to_hold_weights_has_an_error_of_its_own(errors):
    assert max(errors["O1"], errors["B0"]) < errors["O2"] < min(errors["O3r"], errors["O3t"])
    assert errors["O3r"] != errors["O3t"]
    assert isclose(errors["O1f"], errors["O1"], rel_tol=0.05)
    assert isclose(errors["O3rc"], errors["O3r"], rel_tol=0.05)


@pytest.mark.parametrize("build", [build_ours, build_diffusers])
def test_the_grid_and_the_weights_reach_the_result(build):
    with torch.inference_mode():
        found = CANDIDATES["O1" if build is build_ours else "B0"]
        forward = build(found, TINY_SHAPE, "cpu", exact=True).forward
        again = build(found, TINY_SHAPE, "cpu", exact=True).forward
        assert forward((1, 4, 4)).shape == (1, 16, 1, 8, 8)
        assert torch.equal(forward((2, 4, 4)), again((2, 4, 4)))


def test_a_forced_kernel_is_used_and_an_absent_one_refused():
    assert candidate("O3r@math").attention == "math"
    with torch.inference_mode():
        assert build_candidate(candidate("O1@math"), TINY_SHAPE, "cpu").attention == "math"
        assert build_candidate(candidate("O1"), TINY_SHAPE, "cpu").attention == "flash"
        with pytest.raises(Exception, match="cudnn"):
            build_candidate(candidate("O1@cudnn"), TINY_SHAPE, "cpu")
    for name, word in (("O9", "allowed are"), ("B0@flash", "our own")):
        with pytest.raises(ValueError, match=word):
            candidate(name)


@pytest.mark.parametrize("tokens", GRIDS)
def test_a_grid_has_the_tokens_it_is_named_for(tokens):
    frames, rows, columns = GRIDS[tokens]
    assert frames * rows * columns == tokens


@pytest.mark.slow  # three processes, one after the other
def test_dit_writes_a_complete_result(monkeypatch, tmp_path):
    words = ["--tiny", "--turns", 1, "--rounds", 1, "--tokens", 32]
    run(monkeypatch, dit, *words, "--candidates", "B0", "O3r", "O1@cudnn", "--out", tmp_path)
    report = json.loads((tmp_path / "dit_cpu_2layers_tiny.json").read_text())
    assert set(report) >= {"command", "commit", "machine", "versions", "ceilings", "says"}
    assert list(report["results"]["32"]) == list(report["errors"]) == ["B0", "O3r"]
    assert [line.split(",")[0] for line in report["left_out"]] == ["O1@cudnn"]
    assert "cudnn" in report["left_out"][0]
    assert report["built"]["O3r"]["attention"] == "flash"
    found = report["results"]["32"]["O3r"]
    wanted = {"median_s", "min_s", "max_s", "first_call_s", "tflop_per_s", "floor_s",
              "times_the_floor", "spec_floor_s", "speed_up", "peak_allocated_bytes"}  # fmt: skip
    assert set(found) >= wanted
    ceiling = Ceiling(**report["ceilings"]["ceiling"])
    assert found["floor_s"] == floor_seconds(TINY_SHAPE, 32, ceiling, fp8=True)
    (second,) = found["turns"][0]["seconds"]
    assert found["tflop_per_s"] == round(forward_flops(TINY_SHAPE, 32) / second / 1e12, 4)
    shares = report["breakdown"]["O3r"]["share"]
    assert shares["gemm"] > 0 < shares["attention"]
    assert isclose(sum(shares.values()), 1, abs_tol=1e-3)


def test_a_spent_budget_is_told(monkeypatch, tmp_path):
    (tmp_path / "rates.json").write_text('{"ceiling": null}')
    words = ["--tiny", "--budget", 0, "--candidates", "O1", "--ceilings", tmp_path / "rates.json"]
    run(monkeypatch, dit, *words, "--out", tmp_path)
    report = json.loads((tmp_path / "dit_cpu_2layers_tiny.json").read_text())
    assert len(report["left_out"]) == 2 * dit.TURNS + 2
    assert all("budget of 0 s" in line for line in report["left_out"])


def test_times_are_taken_without_the_rates_of_the_card_too(monkeypatch, tmp_path):
    words = ["--tiny", "--turns", 1, "--rounds", 1, "--tokens", 32, "--candidates", "O1"]
    words += ["--no-errors", "--no-profile", "--ceilings", tmp_path / "rates.json"]
    run(monkeypatch, dit, *words, "--out", tmp_path)
    report = json.loads((tmp_path / "dit_cpu_2layers_tiny.json").read_text())
    assert report["ceilings"] == {"ceiling": None, "left_out": "rates.json is not there"}
    found = report["results"]["32"]["O1"]
    assert found["median_s"] > 0
    assert "floor_s" not in found


def turn(seconds, clock):
    card = None if clock is None else {"sm_clock_mhz": clock}
    return {"first_call_s": 9.0, "seconds": seconds, "card_before": card, "card_after": card,
            "peak_allocated_bytes": 5}  # fmt: skip


def test_slow_clocks_do_not_count_and_layers_are_scaled():
    turns = [turn([1.0, 1.2], 1980), turn([3.0, 3.0], 1700), turn([1.1, 1.3], 1900)]
    results = {"B0": {"turns": [turn([2.3], None)]}, "O1": {"turns": turns}}
    args = argparse.Namespace(tiny=True, layers=1)
    found = dit.figures(results, "O1", args, 32, None)
    assert found["turns_not_counted"] == 1
    assert isclose(found["median_s"], 2 * 1.15)
    assert isclose(found["speed_up"], 2.0)
    assert "floor_s" not in found
    assert "multiplied by 2" in dit.scaling_note(args)


def test_turns_alternate_and_only_kept_processes_stay_warm():
    args = argparse.Namespace(tokens=[32], turns=2, rounds=3, no_profile=True, no_errors=True)
    pair = [CANDIDATES["B0"], CANDIDATES["O1"]]
    kept = list(dit.planned(args, pair, keep=True))
    assert [each.name for each, _, _ in kept] == ["B0", "O1", "B0", "O1"]
    assert [order["warm_ups"] for _, order, _ in kept] == [3, 3, 1, 1]
    anew = dit.planned(args, pair, keep=False)
    assert {order["warm_ups"] for _, order, _ in anew} == {3}


def test_the_peer_is_left_out_with_a_sentence_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(dit, "find_spec", lambda _: None)
    report = {"left_out": []}
    args = argparse.Namespace(candidates=list(CANDIDATES.values()), tokens=[32])
    assert all(each.engine == "ours" for each in dit.usable(args, report))
    assert report["left_out"][0] == "B0: the package diffusers is not installed"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit('no memory')", "no memory"),
        ("import time; time.sleep(60)", "no time"),
    ],
)
def test_a_process_that_gives_no_answer(code, says):
    process = Process("O1", ARGS, [sys.executable, "-c", code])
    with pytest.raises(WorkerFailed, match=says):
        process.answer(1.0 if "sleep" in code else 30.0)
    process.close()


def test_kernels_and_gaps_are_told_apart():
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "nvjet_tst_256x128_64x4_2x1_v_bz_TNT": "gemm",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x>": "gemm",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDA>": "elementwise",
        "triton_red_fused_add_mul_native_layer_norm_0": "elementwise",
    }
    assert {name: dit_worker.kind_of(name) for name in names} == names
    assert dit_worker.idle([(0, 4), (1, 2), (5, 6), (9, 10)]) == 4
    assert dit_worker.idle([]) == 0


def test_ceilings_are_complete_and_take_the_best_of_each(monkeypatch, tmp_path):
    run(monkeypatch, ceilings, "--tiny", "--rounds", 1, "--out", tmp_path)
    report = json.loads((tmp_path / "ceilings_cpu_tiny.json").read_text())
    assert len(report["gemm_fp8"]) == 4 * 2 * 2
    assert report["attention"]["cudnn"]["left_out"]
    best = max(case.get("flop_per_s", 0) for case in report["attention"].values())
    assert report["ceiling"]["attention_16bit"] == best
    rates = [case["flop_per_s"] for case in report["gemm_fp8"]]
    assert min(rates) <= report["ceiling"]["gemm_fp8"] <= max(rates)
    assert report["ceiling"]["memory"] == report["copy"]["device_gb_per_s"] * 1e9


def test_the_state_of_a_card_is_read_as_it_is_told():
    found = machine.parse_state("1980, 3201, 312.45, 700.00, [N/A], 98")
    assert found["sm_clock_mhz"] == 1980
    assert found["power_w"] == 312.45
    assert "temperature_c" not in found


@pytest.mark.parametrize("dry", [False, True])
def test_every_part_has_a_command_that_is_understood(dry, monkeypatch):
    args = argparse.Namespace(parts=None, dry=dry)
    for part in gpu_suite.chosen(args):
        words = gpu_suite.words_of(part, args)
        if words[2].startswith("benchmarks.") and find_spec(words[2]):
            module = import_module(words[2])
            monkeypatch.setattr(sys, "argv", words[2:])
            source = inspect.getsource(module)
            assert [w for w in words if w.startswith("--") and f'"{w}"' not in source] == []
            if hasattr(module, "parse"):
                module.parse()
    assert gpu_suite.gpu_tests()


def test_a_dry_suite_writes_results_a_page_and_a_log(monkeypatch, tmp_path):
    words = ["--dry", "--parts", "ceilings", "memory", "--commit", "abc", "--out", tmp_path]
    run(monkeypatch, gpu_suite, *words)
    report = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert report["commit"] == "abc"
    assert report["parts"]["ceilings"]["status"] == "done"
    assert report["parts"]["memory"]["says"].startswith("not in a dry run")
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "| memory | skipped |" in page
    assert "| bf16 product |" in page
    assert "written to" in (tmp_path / "gpu_suite.log").read_text()
    (path,) = gpu_suite.unpack(tmp_path / "gpu_suite.json", tmp_path / "one by one")
    assert json.loads(path.read_text())["ceiling"]


def test_a_result_in_the_repository_is_copied_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "RESULTS", tmp_path)
    (tmp_path / "old.json").write_text("{}")
    before = gpu_suite.results_here()
    (tmp_path / "new.json").write_text("{}")
    work = tmp_path / "work"
    work.mkdir()
    args = argparse.Namespace(dry=False)
    assert gpu_suite.copied(before, work, args) == [work / "new.json"]
    assert gpu_suite.copied(before, work, argparse.Namespace(dry=True)) == []


def suite(tmp_path, *words):
    args = argparse.Namespace(dry=False, budget=50.0, parts=None)
    part = gpu_suite.Part("it", 2.0, shlex.join(words), needs=())
    with (tmp_path / "log").open("w") as log:
        return gpu_suite.run_part(part, args, str(tmp_path), 50.0, log)


def test_a_part_that_fails_or_hangs_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert suite(tmp_path, "no_such_module")["status"] == "failed"
    assert "no_such_module" in suite(tmp_path, "no_such_module")["says"]
    hangs = suite(tmp_path, "http.server", "--bind", "127.0.0.1", "0")
    assert hangs["status"] == "stopped"
    assert hangs["says"] == "not done after 2 s"


def test_parts_are_skipped_with_a_reason():
    args = argparse.Namespace(dry=False, budget=50.0)
    part = gpu_suite.Part("it", 2.0, "x", needs=("no_such_module", "torch"))
    assert gpu_suite.why_skip(part, args, 40.0).endswith("not installed: no_such_module")
    part = gpu_suite.Part("it", 2.0, "x")
    assert gpu_suite.why_skip(part, args, 1.0) == "the budget of 50 s was used up"
    assert gpu_suite.why_skip(part, args, 40.0) == ""


def test_the_rates_come_with_any_part_that_compares(monkeypatch, capsys):
    run(monkeypatch, gpu_suite, "--list", "--parts", "dit_whole", "pose_render")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "ceilings",
        "dit_whole",
        "pose_render",
    ]


def test_it_refuses_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        run(monkeypatch, gpu_suite)


def test_switches_are_told_with_gain_and_drift():
    times = {"B0": 4.0, "O1": 2.0, "O1f": 1.6, "O3r": 1.0}
    report = {
        "errors": {"O1": {"relative_l2": 0.004}, "O3r": {"relative_l2": 0.02}},
        "candidates": dict.fromkeys(times, "what"),
        "results": {"32": {name: {"median_s": s} for name, s in times.items()}, "48": {}},
    }
    rows = {row["candidate"]: row for row in switches(report)["32"]}
    assert list(rows) == ["O1f", "O3r"]
    assert (rows["O1f"]["gain"], rows["O3r"]["gain"]) == (1.25, 2.0)
    assert rows["O3r"]["times_the_error"] == 5.0
    assert rows["O1f"]["relative_l2"] is None
    assert "48" not in switches(report)


def test_a_result_says_where_it_was_made_and_half_of_one_is_passed_over(tmp_path):
    suite_says = {"command": "c", "commit": "abc", "machine": {"device": "x"}, "versions": {}}
    assert gpu_suite.completed({"ok": 1}, suite_says) == suite_says | {"ok": 1}
    assert gpu_suite.completed({"commit": "own"}, suite_says)["commit"] == "own"
    (tmp_path / "half.json").write_text('{"a": [1, 2')
    assert gpu_suite.read_result(tmp_path / "half.json") is None


def test_a_part_without_its_script_is_skipped():
    args = argparse.Namespace(dry=False, budget=50.0)
    part = gpu_suite.Part("it", 2.0, "benchmarks.nowhere --device cuda")
    assert gpu_suite.why_skip(part, args, 40.0) == "benchmarks.nowhere is not there"
