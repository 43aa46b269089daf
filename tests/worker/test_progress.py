"""What a client hears of a job: how often, how much, and nothing after the result."""

from __future__ import annotations

import json
import threading

import pytest

from tests.worker.fakes import WAIT_S, Clock
from xicon_infer.errors import Cancelled
from xicon_infer.types import Progress
from xicon_infer.worker_cancel import CancelFlag
from xicon_infer.worker_progress import JobProgress, Sender, send_to_platform
from xicon_infer.worker_stages import STAGE_OF, WEIGHTS, start_percent

FIELDS = (
    *("stage", "percent", "step", "steps", "window", "windows", "frames_done", "frames"),
    *("eta_s", "elapsed_s", "request_id", "value", "max"),
)


def make(clock, *, taken=lambda payload: True, check=lambda: None):
    sent: list[dict] = []

    def send(payload):
        sent.append(payload)
        return taken(payload)

    return JobProgress("job", check=check, send=send, clock=clock), sent


def test_it_is_a_progress_of_a_recipe():
    made: Progress = make(Clock())[0]
    with made.stage("sample"):
        made.step(1, 2)
    made.warn("x")
    assert made.warnings == ["x"]


def test_weights_are_those_of_the_contract_and_make_a_whole():
    assert sum(WEIGHTS.values()) == 100
    assert WEIGHTS["text"] + WEIGHTS["image"] == 5
    named = {name: WEIGHTS[name] for name in ("fetch", "decode", "pose", "denoise", "vae")}
    assert named == {"fetch": 3, "decode": 2, "pose": 15, "denoise": 60, "vae": 8}
    assert (WEIGHTS["encode"], WEIGHTS["upload"]) == (3, 4)
    assert start_percent("done") == 100
    assert set(STAGE_OF.values()) <= set(WEIGHTS)


def test_every_stage_of_a_recipe_has_a_place():
    import re
    from pathlib import Path

    root = Path(__file__).parents[2]
    files = [*root.glob("pipelines/*.py"), *root.glob("xicon_infer/service*.py")]
    names = {n for path in files for n in re.findall(r'\.stage\("([^"]+)"\)', path.read_text())}
    assert len(names) > 10
    assert names <= set(STAGE_OF)


def test_a_payload_has_every_field_and_is_small():
    clock = Clock()
    progress, sent = make(clock)
    with progress.stage("sample"):
        clock.now += 6
        progress.step(3, 6)
    payload = sent[-1]
    assert set(payload) == set(FIELDS)
    assert len(json.dumps(payload)) < 1024
    assert (payload["stage"], payload["percent"]) == ("denoise", 55)
    assert (payload["step"], payload["steps"], payload["value"], payload["max"]) == (3, 6, 3, 6)
    assert payload["elapsed_s"] == 6
    assert payload["eta_s"] == 9.0  # 30 percent took 6 s, 45 are left


def test_frames_are_counted_apart_from_steps():
    clock = Clock()
    progress, sent = make(clock)
    with progress.stage("decode video"):
        clock.now += 3
        progress.step(40, 81, "frame")
        assert (sent[-1]["frames_done"], sent[-1]["frames"], sent[-1]["step"]) == (40, 81, None)
    with progress.stage("fetch"):
        progress.step(100, 200, "kB")
        assert sent[-1]["step"] is None


def test_a_stage_is_told_at_once_and_steps_only_after_two_seconds_and_two_percent():
    clock = Clock()
    progress, sent = make(clock)
    with progress.stage("sample"):
        assert [p["stage"] for p in sent] == ["denoise"]
        progress.step(1, 10)
        assert len(sent) == 1, "6 percent, but no time passed"
        clock.now += 1.9
        progress.step(2, 10)
        assert len(sent) == 1
        clock.now += 0.2
        progress.step(3, 10)
        assert len(sent) == 2
        clock.now += 100
        progress.step(31, 100)
        assert len(sent) == 2, "time passed, but less than 2 percent"
        progress.step(34, 100)
        assert len(sent) == 3


def test_a_dropped_update_is_made_up_for():
    clock = Clock()
    progress, sent = make(clock, taken=lambda payload: False)
    with progress.stage("sample"):
        progress.step(0, 10)
        progress.step(1, 10)
    assert len(sent) >= 2, "what was dropped does not count as told"


def test_percent_never_falls_whatever_the_recipe_does():
    clock = Clock()
    progress, sent = make(clock)
    for name in ("sample", "draw pose", "load models", "decode video", "sample", "unheard of"):
        with progress.stage(name):
            for done in range(6):
                clock.now += 3
                progress.step(done, 5)
    percents = [payload["percent"] for payload in sent]
    assert percents == sorted(percents)
    assert max(percents) <= 100


def test_an_outer_stage_goes_on_after_an_inner_one():
    progress, sent = make(Clock())
    with progress.stage("find poses"):
        with progress.stage("load models"):
            assert progress.current == "load"
        assert progress.current == "pose"
    assert [p["stage"] for p in sent] == ["pose", "load"]


def test_timings_are_those_of_the_innermost_stage_and_add_up():
    clock = Clock()
    progress, _ = make(clock)
    with progress.stage("find poses"):
        clock.now += 1
        with progress.stage("load models"):
            clock.now += 2
        clock.now += 4
    with progress.stage("sample"):
        clock.now += 8.0004
    found = progress.timings()
    assert found == {"accept": 0, "pose": 5, "load": 2, "denoise": 8, "total": 15}


def test_an_error_leaves_the_stage_it_happened_in():
    progress, _ = make(Clock())
    with pytest.raises(ValueError, match="x"), progress.stage("sample"):
        raise ValueError("x")
    assert progress.current == "denoise"


@pytest.mark.parametrize("method", ["step", "warn", "stage"])
def test_every_report_may_stop_the_job(method):
    flag = CancelFlag()
    progress, _ = make(Clock(), check=flag.check)
    flag.stop()
    with pytest.raises(Cancelled):
        if method == "step":
            progress.step(1, 2)
        elif method == "warn":
            progress.warn("x")
        else:
            with progress.stage("sample"):
                pytest.fail("the stage began")


def test_a_flag_keeps_its_first_reason_and_knows_the_time():
    clock = Clock()
    flag = CancelFlag(clock)
    flag.limit(10)
    flag.check()
    clock.now += 10
    assert flag.reason == "JOB_TIMEOUT"
    flag.stop("CANCELLED")
    flag.stop("WORKER_STOPPING")
    with pytest.raises(Cancelled) as caught:
        flag.check()
    assert caught.value.code == "CANCELLED"


class SlowPlatform:
    """Sends like the SDK: each update from a thread of its own, which waits to be let go."""

    def __init__(self) -> None:
        self.arrived: list[object] = []
        self.let_go = threading.Event()

    def send(self, event, payload):
        def _thread_target():
            assert self.let_go.wait(WAIT_S)
            self.arrived.append(payload["n"])

        threading.Thread(target=_thread_target, daemon=True).start()


def test_one_update_is_under_way_at_most():
    platform = SlowPlatform()
    sender = Sender({}, platform.send)
    assert sender.send({"n": 1})
    assert not sender.send({"n": 2})
    platform.let_go.set()
    assert sender.close()
    assert platform.arrived == [1]


def test_the_last_update_arrives_before_the_result():
    """Without the wait the update lands after the result and the job is in progress for ever."""
    platform = SlowPlatform()
    sender = Sender({}, platform.send)
    sender.send({"n": "update"})
    threading.Timer(0.05, platform.let_go.set).start()
    assert sender.close()
    platform.arrived.append("result")
    assert platform.arrived == ["update", "result"]


def test_nothing_is_sent_after_the_end():
    platform = SlowPlatform()
    sender = Sender({}, platform.send)
    sender.close()
    assert not sender.send({"n": 1})


def test_only_the_thread_of_the_sdk_is_waited_for():
    platform, other = SlowPlatform(), threading.Event()
    platform.let_go.set()

    def send(event, payload):
        threading.Thread(target=other.wait, args=(WAIT_S,), name="ahead", daemon=True).start()
        platform.send(event, payload)

    sender = Sender({}, send)
    sender.send({"n": 1})
    assert sender.close()
    other.set()


def test_the_sdk_names_its_threads_as_we_look_for_them():
    import inspect

    from runpod.serverless.modules import rp_progress

    source = inspect.getsource(rp_progress.progress_update)
    assert "target=_thread_target" in source
    assert threading.Thread(target=rp_progress._thread_target).name.endswith("(_thread_target)")
    assert "progress_update" in inspect.getsource(send_to_platform)


def test_an_update_that_fails_does_not_fail_the_job():
    told: list[Exception] = []

    def send(event, payload):
        raise OSError("no network")

    sender = Sender({}, send, told.append)
    assert sender.send({"n": 1})
    assert sender.close()
    assert [str(error) for error in told] == ["no network"]
