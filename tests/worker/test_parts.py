"""Memory fallback, refresh policy, moderation, tags, context, and the watched session."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from xicon_infer.errors import Cancelled, InvalidRequest, OutOfMemory
from xicon_infer.job import make_job
from xicon_infer.media.video import read_clip
from xicon_infer.media.write import write_video
from xicon_infer.service import run_job
from xicon_infer.settings import read_settings
from xicon_infer.types import Audio, Result, SilentProgress
from xicon_infer.worker_context import Inputs, build_context, input_files
from xicon_infer.worker_machine import device_facts, free_disk, is_device_error
from xicon_infer.worker_memory import Lowered, lower_job, run_with_less
from xicon_infer.worker_moderation import ask, load_judge
from xicon_infer.worker_refresh import GROWN_BYTES, RefreshPolicy, Usage
from xicon_infer.worker_session import WatchedSession
from xicon_infer.worker_tags import tag_video, tags


def wan_job(folder: Path, **values):
    given = {
        "pipeline": "wan_t2v",
        "preset": "tiny",
        "prompt": "a fox",
        "width": 128,
        "height": 128,
        "num_frames": 1,
        "num_inference_steps": 3,
        "seed": 7,
        "fps": 16,
        "output": str(folder / "out.mp4"),
        "overwrite": True,
    }
    return make_job(given | values, source="request")


class Machine:
    """Runs out of memory a few times, and counts."""

    def __init__(self, times: int) -> None:
        self.times, self.jobs, self.freed, self.told = times, [], 0, []

    def run(self, job):
        self.jobs.append(job)
        if len(self.jobs) <= self.times:
            raise OutOfMemory("too big")
        return "made"

    def free(self):
        self.freed += 1

    def tell(self, error, change):
        self.told.append(change)

    def go(self, job, **options):
        return run_with_less(job, self.run, free=self.free, tell=self.tell, **options)


def test_out_of_memory_lowers_the_plan_and_keeps_the_seed(tmp_path):
    machine = Machine(2)
    result, job = machine.go(wan_job(tmp_path))
    assert result == "made"
    assert [j.seed for j in machine.jobs] == [7, 7, 7]
    assert [(j.tile, j.memory) for j in machine.jobs[1:]] == [(True, "auto"), (True, "offload")]
    assert machine.freed == 2
    assert all(machine.told)
    assert job is machine.jobs[-1]


def test_it_is_tried_again_twice_at_most(tmp_path):
    machine = Machine(99)
    with pytest.raises(OutOfMemory):
        machine.go(wan_job(tmp_path))
    assert len(machine.jobs) == 3
    assert machine.told[-1] == ""


def test_a_memory_that_suffices_is_left_alone(tmp_path):
    machine = Machine(0)
    machine.go(wan_job(tmp_path))
    assert (len(machine.jobs), machine.freed, machine.told) == (1, 0, [])


def test_the_lower_plan_can_be_another(tmp_path):
    machine = Machine(1)
    other = wan_job(tmp_path, seed=8)
    _, job = machine.go(wan_job(tmp_path), lower=lambda job, error: Lowered(other, "x"))
    assert job is other


def test_plans_are_lowered_in_order_down_to_the_smallest_window(tmp_path):
    job, seen = wan_job(tmp_path, context_frames=49), []
    while lowered := lower_job(job, OutOfMemory("x")):
        job = lowered.job
        seen.append((job.tile, job.memory, job.context_frames))
    assert seen == [
        (True, "auto", 49),
        (True, "offload", 49),
        (True, "stream", 49),
        (True, "stream", 33),
        (True, "stream", 17),
    ]
    assert job.context_overlap < job.context_frames


def test_no_lower_plan_for_poses_and_for_what_was_refused_beforehand(tmp_path):
    job = wan_job(tmp_path)
    assert lower_job(job, OutOfMemory("x", field="memory")) is None
    assert lower_job(job, OutOfMemory("x", code="HOST_OOM")) is None
    assert lower_job(replace(job, pipeline="pose"), OutOfMemory("x")) is None


def test_what_the_failed_try_held_is_let_go(tmp_path):
    import gc
    import weakref

    held = []

    def run(job):
        if held:
            gc.collect()
            assert held[0]() is None, "the tensors of the first try are still there"
            return "made"
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise OutOfMemory("x")

    run_with_less(wan_job(tmp_path), run, free=lambda: None, tell=lambda error, change: None)


def policy(usage=None, **options) -> RefreshPolicy:
    given = {"always": False, "max_jobs": 0} | options
    return RefreshPolicy(usage=lambda: usage or Usage(0, 10**12), **given)


@pytest.mark.parametrize(
    ("options", "code", "fresh"),
    [
        ({}, "", False),
        ({}, "GPU_OOM", False),
        ({}, "FETCH_FAILED", False),
        ({}, "GPU_ERROR", True),
        ({"always": True}, "", True),
        ({"always": True}, "MISSING_FIELD", True),
        ({"max_jobs": 1}, "", True),
        ({"max_jobs": 2}, "", False),
        ({"usage": Usage(0, 10**9)}, "", True),
    ],
)
def test_when_a_fresh_worker_is_asked_for(options, code, fresh):
    assert bool(policy(**options).after_job(code, ("scail", "fp8"))) is fresh


def test_three_internal_errors_in_a_row_but_not_with_a_success_between():
    made = policy()
    codes = ["INTERNAL", "INTERNAL", "", "INTERNAL", "INTERNAL", "INTERNAL"]
    assert [bool(made.after_job(code, ())) for code in codes] == [False] * 5 + [True]


def test_requests_without_the_device_are_no_jobs():
    made = policy(max_jobs=1)
    assert not made.after_job("MISSING_FIELD", (), worked=False)
    assert not made.after_job("", (), worked=False)
    assert made.after_job("", (), worked=True)
    assert policy(always=True).after_job("", (), worked=False)


def test_grown_memory_is_measured_against_the_same_networks():
    now = Usage(5 * 2**30, 10**12)
    made = RefreshPolicy(always=False, max_jobs=0, usage=lambda: now)
    assert not made.after_job("", ("scail",))
    now = Usage(9 * 2**30, 10**12)
    assert not made.after_job("", ("wan_i2v",)), "another model, another baseline"
    now = Usage(5 * 2**30 + GROWN_BYTES, 10**12)
    assert not made.after_job("", ("scail",))
    now = Usage(5 * 2**30 + GROWN_BYTES + 1, 10**12)
    assert made.after_job("GPU_OOM", ("scail",)) == "device memory grew"


def test_the_baseline_is_that_after_the_warm_up():
    now = Usage(2**30, 10**12)
    made = RefreshPolicy(always=False, max_jobs=0, usage=lambda: now)
    made.settle(("scail",))
    now = Usage(2**30 + GROWN_BYTES + 1, 10**12)
    assert made.after_job("", ("scail",))


def test_device_errors_are_told_from_others():
    assert is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_device_error(type("AcceleratorError", (RuntimeError,), {})("x"))
    assert not is_device_error(RuntimeError("shapes"))
    assert not is_device_error(ValueError("CUDA error"))


def test_the_machine_is_looked_at(tmp_path):
    assert free_disk(tmp_path / "not" / "there") == free_disk(tmp_path) > 0
    assert set(device_facts()) == {"gpu", "vram_total_bytes", "vram_free_bytes"}


def judge_nudes(stage, request, video):
    return "nudity" if request["prompt"] == "nude" and stage == "request" else None


def test_the_owners_judge_is_found_and_asked():
    judge = load_judge(f"{__name__}:judge_nudes")
    ask(judge, "request", {"prompt": "dance"}, None)
    ask(None, "request", {"prompt": "nude"}, None)
    with pytest.raises(InvalidRequest, match="nudity") as caught:
        ask(judge, "request", {"prompt": "nude"}, None)
    assert caught.value.code == "CONTENT_REJECTED"


@pytest.mark.parametrize("name", ["x", "no.such.module:f", "json:nothing", ":f", "json:"])
def test_a_judge_that_is_not_there_is_a_fault_of_the_start(name):
    with pytest.raises(InvalidRequest, match="XICON_MODERATION"):
        load_judge(name)
    assert load_judge("") is None


def result(path: Path) -> Result:
    settings = {
        "prompt": "secret words",
        "steps": 4,
        "image": "/a/b.png",
        "scheduler": "unipc/beta",
    }
    return Result(path, "video/mp4", 7, 5, 64, 64, Fraction(16), settings, [], [], {})


def test_a_file_tells_its_software_and_its_settings_only_if_allowed(tmp_path):
    plain = tags(result(tmp_path / "x"), with_settings=False)
    assert list(plain) == ["software"]
    more = tags(result(tmp_path / "x"), with_settings=True)
    found = json.loads(more["comment"])
    assert found["seed"] == 7
    assert found["settings"]["steps"] == 4
    assert "secret" not in more["comment"]
    assert "/a/b" not in more["comment"]


def test_tagging_changes_neither_pictures_nor_sound(tmp_path):
    path = tmp_path / "x.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 48, 3), np.uint8)
    tone = Audio(np.sin(np.arange(9000, dtype=np.float32))[None] * 0.3, 16000)
    write_video(path, frames, fps=Fraction(16), audio=tone)
    before = read_clip(path)
    tag_video(path, {"software": "xicon-infer 1"})
    after = read_clip(path)
    assert np.array_equal(before.frames, after.frames)
    assert np.array_equal(before.audio.samples, after.audio.samples)
    with av.open(str(path)) as container:
        assert container.metadata["software"] == "xicon-infer 1"
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_the_worker_knows_what_is_installed(tmp_path):
    for name in ("loras/a.safetensors", "loras/b.pt", "vae/v.safetensors", "other/x.safetensors"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    video = tmp_path / "d.mp4"
    settings = read_settings({"XICON_MODES": "scail", "XICON_DEFAULT_VIDEO": str(video)})
    found = build_context(settings, [tmp_path / "models"], ["scail"])
    assert found.loras == {"a.safetensors"}, "a pickle is not offered"
    assert found.models == {"a.safetensors", "b.pt", "v.safetensors"}
    assert found.modes == {"scail"}
    assert not found.default_driving_video
    video.write_bytes(b"x")
    assert build_context(settings, [], []).default_driving_video


def test_input_files_are_found_by_name_but_not_deep_or_hidden(tmp_path):
    for name in ("a.png", "in/a.png", "in/b.mp4", "in/x/y/z/deep.png", ".hidden/c.png", ".d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = input_files([tmp_path, tmp_path / "absent"])
    assert found == {"a.png": tmp_path / "a.png", "b.mp4": tmp_path / "in" / "b.mp4"}
    inputs = Inputs([tmp_path])
    assert inputs.look({"input": {"mode": "scail"}}) == {}, "nobody asked for a name"
    assert set(inputs.look({"input": {"workflow": {}}})) == {"a.png", "b.mp4"}


def test_a_stop_in_the_middle_of_a_step_leaves_a_session_that_works(tmp_path):
    """The networks ask before each pass, and a job after the stopped one makes the same video."""
    clean = run_job(wan_job(tmp_path), SilentProgress(), WatchedSession())
    wanted = read_clip(clean.path).frames
    session, passes = WatchedSession(), []

    def check():
        passes.append(1)
        if len(passes) == stop_at:
            raise Cancelled("stop")

    stop_at = 0
    session.check = check
    run_job(wan_job(tmp_path), SilentProgress(), session)
    total, passes[:] = len(passes), []
    assert total > 3 + 2, "three steps, a text encoder, a decoder"
    for stop_at in (1, total // 2, total):
        with pytest.raises(Cancelled):
            run_job(wan_job(tmp_path, prompt=f"fox {stop_at}"), SilentProgress(), session)
        assert len(passes) == stop_at, "nothing ran after the stop"
        passes[:] = []
    stop_at = 0
    again = run_job(wan_job(tmp_path), SilentProgress(), session)
    assert np.array_equal(read_clip(again.path).frames, wanted)
    assert session.loaded == ("wan_t2v", "tiny")
