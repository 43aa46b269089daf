"""Start-up: what a worker that cannot work says, and to whom."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.worker.fakes import FakeJobs, make_worker
from xicon_infer.errors import WeightsError
from xicon_infer.settings import read_settings
from xicon_infer.worker_progress import send_to_platform
from xicon_infer.worker_start import on_platform, run_worker
from xicon_infer.worker_warm import warm_modes, warm_shape

ROOT = Path(__file__).parents[2]
PLATFORM = {
    "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/job-take/1",
    "RUNPOD_WEBHOOK_POST_OUTPUT": "http://127.0.0.1/job-done/1",
}


class FakeSdk:
    """Keeps what it is told; like the SDK, a failed check ends everything."""

    def __init__(self) -> None:
        self.configs: list[dict] = []
        self.checks: list = []

    def start(self, config):
        self.configs.append(config)

    def register_fitness_check(self, func):
        self.checks.append(func)
        return func


def begin(env, argv=("handler.py",), prepare=None):
    sdk, written, words = FakeSdk(), [], list(argv)
    code = run_worker(sdk, env=env, argv=words, prepare=prepare, write=written.append)
    return code, sdk, [json.loads(line) for line in written], words


def ready(settings, tools):
    ready.tools = tools
    return make_worker(FakeJobs())[0]


def broken(settings, tools):
    raise WeightsError("the file big.safetensors\nis missing")


def test_a_ready_worker_is_started_and_says_so():
    code, sdk, lines, _ = begin({}, prepare=ready)
    assert code == 0
    assert not sdk.checks
    answer = asyncio.run(sdk.configs[0]["handler"]({"id": "a", "input": {"do": "quickly"}}))
    assert answer["status"] == "success"
    assert lines[-1]["event"] == "ready"
    assert lines[-1]["seconds"] >= 0


def test_the_handler_is_asynchronous_and_no_generator():
    """A plain function would run on the SDK's event loop, and no stop would be seen (F1)."""
    import inspect

    _, sdk, _, _ = begin({}, prepare=ready)
    handler = sdk.configs[0]["handler"]
    assert inspect.iscoroutinefunction(handler)
    assert not inspect.isasyncgenfunction(handler)
    assert set(sdk.configs[0]) == {"handler"}, "one job at a time is the SDK's default"


def test_on_the_platform_one_check_tells_why_and_then_starts():
    code, sdk, lines, _ = begin(PLATFORM, prepare=broken)
    assert code == 1
    (check,) = sdk.checks
    assert len(sdk.configs) == 1, "the SDK makes the check inside start()"
    with pytest.raises(RuntimeError, match=r"big\.safetensors is missing"):
        check()
    assert lines[-1]["event"] == "start.failed"
    refused = asyncio.run(sdk.configs[0]["handler"]({"id": "a", "input": {}}))
    assert isinstance(refused["error"], str)


@pytest.mark.parametrize(
    ("env", "argv"),
    [
        ({}, ("handler.py",)),
        (PLATFORM, ("handler.py", "--test_input", "{}")),
        (PLATFORM, ("handler.py", "--rp_serve_api")),
        (PLATFORM | {"RUNPOD_REALTIME_PORT": "8000"}, ("handler.py",)),
    ],
)
def test_elsewhere_it_is_printed_and_no_job_is_taken(env, argv):
    code, sdk, lines, _ = begin(env, argv, prepare=broken)
    assert code == 1
    assert (sdk.checks, sdk.configs) == ([], [])
    assert "big.safetensors" in lines[-1]["message"]
    assert not on_platform(env, list(argv))


def test_all_faults_of_the_settings_are_told_at_once():
    code, _, lines, _ = begin({"XICON_MAX_FRAMES": "x", "XICON_NONSENSE": "1"}, prepare=ready)
    assert code == 1
    told = [line["message"] for line in lines if line["event"] == "start.failed"]
    assert len(told) == 2


def test_a_bug_in_the_start_is_told_with_its_traceback_in_the_log():
    code, _, lines, _ = begin({}, prepare=lambda settings, tools: 1 / 0)
    assert code == 1
    assert "ZeroDivisionError" in lines[-1]["traceback"]


def test_progress_goes_to_the_platform_only_where_there_is_one():
    begin(PLATFORM, prepare=ready)
    assert ready.tools.send is send_to_platform
    begin(PLATFORM, ("handler.py", "--rp_serve_api"), prepare=ready)
    assert ready.tools.send is None
    begin({}, prepare=ready)
    assert ready.tools.send is None


def test_the_settings_reach_the_limits_of_the_worker():
    env = {"XICON_JOB_TIMEOUT_S": "77", "XICON_CANCEL_GRACE_S": "5"}
    begin(env, prepare=ready)
    assert (ready.tools.limits.job_s, ready.tools.limits.grace_s) == (77, 5)


def test_secrets_of_the_settings_stay_out_of_the_log():
    def leaky(settings, tools):
        raise WeightsError(f"token {settings.hf_token}")

    _, _, lines, _ = begin({"HF_TOKEN": "hf_abcdefgh"}, prepare=leaky)
    assert "hf_abcdefgh" not in json.dumps(lines)


def test_the_local_api_can_be_chosen_by_a_variable():
    _, _, _, words = begin({"SERVE_API_LOCALLY": "true"}, prepare=ready)
    assert words[1:] == ["--rp_serve_api", "--rp_api_host", "0.0.0.0", "--rp_api_port", "8000"]
    _, _, _, words = begin({}, prepare=ready)
    assert words == ["handler.py"]


def test_the_first_mode_stays_loaded():
    env = {"XICON_MODES": "scail,wan_t2v,pose_only"}
    ready = ("pose_only", "wan_t2v", "scail")
    assert warm_modes(read_settings(env), ready) == ["wan_t2v", "scail"]
    assert warm_modes(read_settings(env | {"XICON_WARMUP": "0"}), ready) == ["scail"]
    assert warm_modes(read_settings(env), ("wan_t2v",)) == ["wan_t2v"], "weights are missing"
    assert warm_modes(read_settings({"XICON_MODES": "pose_only"}), ready) == []


def test_a_gpu_is_warmed_at_the_default_size():
    assert warm_shape("scail", gpu=False).frames == 5
    shape = warm_shape("wan_t2v", gpu=True)
    assert (shape.width, shape.height, shape.frames) == (832, 480, 81)
    assert (warm_shape("scail", gpu=True).width, warm_shape("scail", gpu=True).height) == (512, 896)


def test_the_shell_stays_a_shell():
    text = (ROOT / "handler.py").read_text()
    assert len(text.splitlines()) <= 60
    assert '\nif __name__ == "__main__":\n    sys.exit(main())\n' in text


def test_a_second_execution_of_the_main_module_starts_nothing():
    """The SDK's heartbeat executes it again where processes are spawned (F9)."""
    import runpy
    import sys

    before = set(sys.modules)
    runpy.run_path(str(ROOT / "handler.py"), run_name="__mp_main__")
    assert not {n for n in set(sys.modules) - before if n.startswith(("xicon", "torch", "runpod"))}


def test_only_the_shell_and_the_progress_know_the_sdk():
    users = {
        path.name
        for path in [ROOT / "handler.py", *(ROOT / "xicon_infer").glob("worker*.py")]
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import runpod", "from runpod"))
    }
    assert users == {"handler.py", "worker_progress.py"}


@pytest.mark.parametrize(
    ("argv", "file", "dry"),
    [
        (["handler.py"], {"input": {"dry_run": True}}, True),
        (["handler.py"], {"input": {"mode": "scail"}}, False),
        (["handler.py"], None, False),
        (["handler.py", "--test_input", '{"input": {"dry_run": true}}'], None, True),
        (["handler.py", '--test_input={"input": {"action": "health"}}'], None, True),
        (["handler.py", "--test_input", '{"input": {}}'], {"input": {"dry_run": True}}, False),
        (["handler.py", "--rp_serve_api"], {"input": {"dry_run": True}}, False),
    ],
    ids=str,
)
def test_a_plan_alone_needs_no_weights(tmp_path, monkeypatch, argv, file, dry):
    monkeypatch.chdir(tmp_path)
    if file is not None:
        (tmp_path / "test_input.json").write_text(json.dumps(file))
    begin({}, argv=argv, prepare=ready)
    assert ready.tools.dry is dry


@pytest.mark.parametrize(
    ("argv", "file", "told"),
    [
        (["handler.py", "--test_input", "{bad"], None, "--test_input must be one JSON object"),
        (["handler.py", "--test_input=[1]"], None, "it is a list, got '[1]'"),
        (["handler.py", "--test_input"], None, "it is no JSON"),
        (["handler.py"], "{bad", "test_input.json must be one JSON object"),
    ],
    ids=str,
)
def test_a_bad_local_job_is_told_in_one_line_before_anything_is_loaded(
    tmp_path, monkeypatch, argv, file, told
):
    monkeypatch.chdir(tmp_path)
    if file is not None:
        (tmp_path / "test_input.json").write_text(file)
    loaded = []
    code, sdk, lines, _ = begin({}, argv=argv, prepare=lambda *given: loaded.append(given))
    assert (code, loaded, sdk.configs) == (1, [], [])
    (line,) = [line for line in lines if line["level"] == "ERROR"]
    assert told in line["message"]
    assert "traceback" not in line


def test_the_steps_of_a_start_are_in_the_log_and_in_the_numbers():
    def timed(settings, tools):
        tools.timed("kernels", lambda: None)
        timed.metrics = tools.metrics
        return ready(settings, tools)

    _, _, lines, _ = begin({}, prepare=timed)
    assert [line["step"] for line in lines if line["event"] == "start.step"] == ["kernels"]
    assert 'xicon_start_step_seconds{step="kernels"}' in timed.metrics.numbers()


def test_weights_are_read_before_torch_is_imported(tmp_path):
    """The first complete mode in the order of loading; its bytes come into the page cache."""
    import subprocess
    import sys

    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from xicon_infer import worker_start
from xicon_infer.settings import read_settings
from xicon_infer.weights import warmup
from xicon_infer.weights.manifest import files_for

folder = Path({str(tmp_path)!r})
for entry in files_for("wan_t2v", "1.3b"):
    path = folder / entry.names[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
seen = []
warmup.warm_files = lambda paths: seen.append((paths, "torch" in sys.modules))
env = {{"XICON_MODELS_DIR": str(folder), "XICON_PRESET": "1.3b"}}
worker_start._read_ahead(read_settings(env))
(paths, torch), = seen
assert not torch
assert len(paths) == len(files_for("wan_t2v", "1.3b")), paths
worker_start._read_ahead(read_settings(env | {{"XICON_PRESET": "tiny"}}))
assert len(seen) == 1, "the tiny preset has no files"
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_on_the_platform_weights_are_always_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_input.json").write_text(json.dumps({"input": {"dry_run": True}}))
    begin(PLATFORM, prepare=ready)
    assert ready.tools.dry is False
