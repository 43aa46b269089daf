"""The options `kernels` and `fuse_qkv` in a whole job, and where compiled kernels are kept."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.fusing import FUSINGS
from xicon_infer import runtime
from xicon_infer.errors import BackendUnavailable
from xicon_infer.job import make_job
from xicon_infer.job_fields import FIELDS
from xicon_infer.media.video import read_clip
from xicon_infer.ops import fused_choice
from xicon_infer.service import run_job
from xicon_infer.service_options import load_options
from xicon_infer.settings import read_settings
from xicon_infer.types import SilentProgress

JOB = {
    "pipeline": "wan_t2v",
    "preset": "tiny",
    "prompt": "a fox",
    "width": 128,
    "height": 128,
    "num_frames": 1,
    "num_inference_steps": 1,
    "seed": 3,
}


def done(folder, name, **options):
    job = make_job({**JOB, **options, "output": str(folder / f"{name}.mp4")})
    result = run_job(job, SilentProgress())
    return result.machine, read_clip(result.path).frames


def test_the_report_says_what_ran(tmp_path):
    machine, plain = done(tmp_path, "plain")
    assert machine["kernels"] == "eager"
    assert machine["kernels_note"].startswith("auto:")
    assert machine["fused_qkv"]["fused_blocks"] == 0
    machine, fused = done(tmp_path, "fused", fuse_qkv="on", kernels="eager")
    assert machine["kernels_note"] == "as asked"
    assert machine["fused_qkv"]["fused_blocks"] == machine["fused_qkv"]["blocks"] > 0
    # The products are the same sums; the encoder may round a pixel the other way.
    assert np.abs(fused.astype(int) - plain.astype(int)).max() <= 2


def test_kernels_that_do_not_run_are_refused_before_loading(tmp_path, monkeypatch):
    monkeypatch.setattr("xicon_infer.service._run", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BackendUnavailable, match="kernels 'triton' do not run on cpu") as caught:
        done(tmp_path, "triton", kernels="triton")
    assert caught.value.field == "kernels"


def test_options_reach_the_loader():
    for name, values in {"kernels": ("eager", "compile"), "fuse_qkv": ("on", "off")}.items():
        for value in values:
            job = make_job({**JOB, name: value, "output": "out.mp4"})
            assert getattr(load_options(job, runtime.pick_device("cpu"), None, None), name) == value


def test_the_worker_has_a_variable():
    assert read_settings({}).kernels == "auto"
    assert read_settings({"XICON_KERNELS": "eager"}).kernels == "eager"


def test_compiled_kernels_are_kept_beside_the_rest(tmp_path, monkeypatch):
    variables = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    monkeypatch.setenv("XICON_CACHE_DIR", str(tmp_path / "cache"))
    for name in variables:
        monkeypatch.setenv(name, "")
    runtime.keep_compiled_kernels()
    for name, folder in variables.items():
        assert runtime.environment()[name] == str(tmp_path / "cache" / folder)
        assert (tmp_path / "cache" / folder).is_dir()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    runtime.keep_compiled_kernels()
    assert runtime.environment()["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XICON_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    runtime.keep_compiled_kernels()
    assert runtime.environment()["TRITON_CACHE_DIR"] == ""


def test_names_of_the_table_are_those_of_the_kernels():
    choices = {field.name: field.choices for field in FIELDS}
    assert choices["kernels"] == ("auto", *fused_choice.KERNELS)
    assert choices["fuse_qkv"] == FUSINGS
