"""Whole jobs and cold starts, at tiny size: the same code as on a GPU."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

from benchmarks import cold_start, job, job_models
from pipelines.loading import LoadOptions
from xicon_infer.job import make_job


def run(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_a_whole_job_is_told_stage_by_stage(monkeypatch, tmp_path):
    words = ["--tiny", "--rounds", 1, "--shape", "scail-81", "--out", tmp_path]
    run(monkeypatch, job, *words, "--set", "attention=math", "num_inference_steps=3")
    told = json.loads((tmp_path / "job_scail-81_cpu_tiny.json").read_text())
    assert set(told) >= {"machine", "versions", "commit", "first_job_s", "total"}
    wanted = {"read", "draw_pose", "text", "clip", "vae_encode", "project", "sample",
              "vae_decode", "mux"}  # fmt: skip
    assert set(told["stages"]) >= wanted
    # What encoders made is forgotten, networks are kept.
    assert "load models" in told["runs"][0]["stages"]
    assert "load models" not in told["stages"]
    assert len(told["steps_s"]) == 3
    assert sum(told["steps_s"]) <= told["stages"]["sample"]["seconds"] + 0.01
    assert told["total"]["median_s"] >= sum(s["seconds"] for s in told["stages"].values()) - 0.01
    made = told["runs"][-1]["used"]
    assert (made["attention"], made["size"], made["frames"]) == ("math", [128, 160], 5)
    assert made["storage"]["fp8_layers"] > 0
    assert made["storage"]["matmul"] == "scaled_mm_row"
    assert str(tmp_path) not in json.dumps(told["job"])
    assert "no pose network runs" in told["says"][0]


def test_weights_are_those_of_a_prepared_file():
    sizes = job_models.sizes_of("scail", small=True)
    options = LoadOptions(dtype=torch.bfloat16, matmul="scaled_mm_row")
    parts = job_models.build("scail", sizes, options).components
    layer = parts.transformer.blocks[0].self_attn.q
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.scale_weight.shape == (sizes.transformer.dim, 1)
    again = job_models.build("scail", sizes, options).components
    twin = again.transformer.blocks[0].self_attn.q
    assert torch.equal(layer.weight.view(torch.uint8), twin.weight.view(torch.uint8))


def test_without_the_library_of_encoders_it_says_so(monkeypatch):
    monkeypatch.setattr(job_models, "find_spec", lambda name: None)
    sizes = job_models.sizes_of("scail", small=True)
    with job_models.stand_ins(sizes) as says:
        parts = job_models.build("scail", sizes, LoadOptions()).components
        assert "transformers is not installed" in says[0]
        assert not list(parts.text_encoder.parameters())


def test_published_sizes_need_a_gpu_and_one_pipeline(monkeypatch, capsys):
    for words, says in (
        (["--shape", "scail-81"], "need --device cuda"),
        (["--tiny", "--shape", "scail-81", "dancer-81"], "of one pipeline"),
        (["--tiny", "--card", "18"], "--card needs"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, job, *words)
        assert says in capsys.readouterr().err


def test_numbers_of_options_are_numbers():
    assert job._pair("crf=30") == ("crf", 30)
    assert job._pair("attention=math") == ("attention", "math")
    made = make_job({"pipeline": "wan_t2v", "prompt": "a", "crf": job._pair("crf=30")[1]})
    assert made.crf == 30


def test_a_start_is_told_step_by_step(monkeypatch, tmp_path):
    run(monkeypatch, cold_start, "--tiny", "--cases", "early-reading", "--out", tmp_path)
    told = json.loads((tmp_path / "cold_start_cpu_tiny.json").read_text())
    start = told["starts"]["early-reading"]
    assert told["left_out"] == []
    steps = start["steps_s"]
    wanted = {"python", "import torch", "import the project", "read weights", "first forward"}
    assert set(steps) >= wanted
    ready = sum(seconds for name, seconds in steps.items() if name != "second forward")
    assert ready == pytest.approx(start["ready_s"], abs=0.01)
    assert start["facts"]["early_bytes"] == told["file_bytes"]
    assert start["whole"] is None


def test_whole_weights_are_computed_from_the_rates():
    start = cold_start.figures(
        {"python": 1.0, "read weights": 3.0, "assemble": 4.0, "first forward": 6.0,
         "second forward": 7.0}
    )  # fmt: skip
    assert start["steps_s"]["read weights"] == 2.0
    assert start["ready_s"] == 6.0
    report = {"file_bytes": 12e9, "layers": 20}
    whole = cold_start.scaled(start, report, argparse.Namespace(tiny=False))
    assert whole["ready_s"] == 1 + 2 * 2 + 1 * 2 + 2 * 2
    assert whole["read_gb_per_s"] == 6.0


def test_a_start_that_fails_is_told_and_the_rest_goes_on(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("a start failed: no disk")

    monkeypatch.setattr(cold_start, "start_once", fail)
    run(monkeypatch, cold_start, "--tiny", "--cases", "kernels-kept", "--out", tmp_path)
    told = json.loads((tmp_path / "cold_start_cpu_tiny.json").read_text())
    assert told["left_out"] == ["kernels-kept: a start failed: no disk"]
