"""The life of a job on the event loop: in turn, stopped, out of time, repeated, broken."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.worker.fakes import WAIT_S, Clock, FakeJobs, lines, make_worker
from xicon_infer.worker import STUCK_EXIT_CODE, Limits


def event(name: str, do: str, **more) -> dict:
    return {"id": name, "input": {"do": do, **more}}


async def seen(flag) -> None:
    """Waits for a threading.Event without holding the loop."""
    assert await asyncio.to_thread(flag.wait, WAIT_S)


def test_the_loop_stays_free_while_a_job_runs():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "when_told")))
        await seen(jobs.started)
        for _ in range(50):  # the loop turns while the thread waits for us
            await asyncio.sleep(0)
        assert not task.done()
        jobs.go_on.set()
        return await task

    assert asyncio.run(scene())["status"] == "success"


def test_two_jobs_never_run_at_once_and_keep_their_order():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        await asyncio.gather(*(worker.handle(event(f"j{n}", "quickly")) for n in range(8)))

    asyncio.run(scene())
    assert jobs.most == 1
    assert jobs.events == [f"{what} j{n}" for n in range(8) for what in ("start", "end")]


def test_health_and_refusals_are_answered_while_a_job_runs():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "when_told")))
        await seen(jobs.started)
        health = await worker.handle(event("h", "health"))
        refused = await worker.handle(event("r", "refuse"))
        assert not task.done()
        jobs.go_on.set()
        await task
        return health, refused

    health, refused = asyncio.run(scene())
    assert health == {"status": "healthy"}
    assert refused["error"] == "no [INVALID_REQUEST]"
    assert refused["error_detail"]["stage"] == "validate"
    assert [worked for _, worked in jobs.done_codes] == [False, False, True]


def test_a_stopped_job_leaves_the_device_before_the_next_one_starts():
    jobs = FakeJobs()
    worker, written = make_worker(jobs)

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "until_stopped")))
        await seen(jobs.started)
        following = asyncio.create_task(worker.handle(event("b", "quickly")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert jobs.events[:2] == ["start a", "end a"], "the stop was told before the thread left"
        return await following

    assert asyncio.run(scene())["status"] == "success"
    assert jobs.events == ["start a", "end a", "start b", "end b"]
    assert "job.cancelled" in [line["event"] for line in lines(written)]


def test_a_job_stopped_twice_still_waits_for_its_thread():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "never_checks")))
        await seen(jobs.started)
        for _ in range(3):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        assert not task.done()
        jobs.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert jobs.events == ["start a", "end a"]


def test_a_job_stopped_while_it_waits_never_starts():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        first = asyncio.create_task(worker.handle(event("a", "when_told")))
        await seen(jobs.started)
        second = asyncio.create_task(worker.handle(event("b", "quickly")))
        await worker.handle(event("h", "health"))  # by then the second one waits for its turn
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        jobs.go_on.set()
        await first
        return await worker.handle(event("c", "quickly"))

    assert asyncio.run(scene())["status"] == "success"
    assert "start b" not in jobs.events


def test_a_thread_that_does_not_leave_ends_the_process_and_holds_the_device():
    jobs, codes = FakeJobs(), []
    worker, written = make_worker(jobs, exit=codes.append, limits=Limits(1000, grace_s=0))

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "never_checks")))
        await seen(jobs.started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        following = asyncio.create_task(worker.handle(event("b", "quickly")))
        await worker.handle(event("h", "health"))
        for _ in range(20):
            await asyncio.sleep(0)
        following.cancel()
        jobs.go_on.set()

    asyncio.run(scene())
    assert codes == [STUCK_EXIT_CODE] == [70]
    assert "start b" not in jobs.events
    assert "job.stuck" in [line["event"] for line in lines(written)]


def test_a_job_out_of_time_gets_a_reason():
    jobs, clock = FakeJobs(), Clock()
    worker, _ = make_worker(jobs, clock=clock)

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "until_stopped", timeout_s=50)))
        await seen(jobs.started)
        clock.now += 49
        await asyncio.sleep(0.01)
        assert not task.done()
        clock.now += 2
        return await task

    answer = asyncio.run(scene())
    assert answer["error_code"] == "JOB_TIMEOUT"
    assert "50 s" in answer["error"]
    assert answer["error_detail"]["retryable"] is False
    assert answer["error_detail"]["field"] == "timeout_s"


def test_the_limit_of_the_worker_is_above_that_of_the_request():
    jobs, clock = FakeJobs(), Clock()
    worker, _ = make_worker(jobs, clock=clock, limits=Limits(10, WAIT_S))

    async def scene():
        task = asyncio.create_task(worker.handle(event("a", "until_stopped", timeout_s=50)))
        await seen(jobs.started)
        clock.now += 11
        return await task

    assert "10 s" in asyncio.run(scene())["error"]


def test_a_stuck_job_out_of_time_is_answered_and_the_worker_given_up():
    jobs = FakeJobs()
    worker, written = make_worker(jobs, limits=Limits(job_s=0.0, grace_s=0.0))

    async def scene():
        answer = await worker.handle(event("a", "never_checks"))
        jobs.go_on.set()
        return answer

    answer = asyncio.run(scene())
    assert answer["error_code"] == "JOB_TIMEOUT"
    assert answer["refresh_worker"] is True
    assert "job.stuck" in [line["event"] for line in lines(written)]


def test_a_repeated_job_is_made_once():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        return [await worker.handle(event("a", "quickly")) for _ in range(3)]

    first, *others = asyncio.run(scene())
    assert others == [first, first]
    assert jobs.made == 1
    assert others[0] is not first, "the SDK takes keys out of what it is given"


def test_another_input_under_the_same_id_is_another_job():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        await worker.handle(event("a", "quickly"))
        await worker.handle(event("a", "quickly", seed=2))

    asyncio.run(scene())
    assert jobs.made == 2


def test_a_failure_is_tried_again():
    jobs = FakeJobs()
    worker, _ = make_worker(jobs)

    async def scene():
        return [await worker.handle(event("a", "breaks")) for _ in range(2)]

    answers = asyncio.run(scene())
    assert jobs.made == 2
    assert [a["error_code"] for a in answers] == ["INTERNAL"] * 2


def test_a_bug_becomes_an_answer_without_its_text():
    worker, _ = make_worker(FakeJobs())
    answer = asyncio.run(worker.handle(event("a", "breaks")))
    assert answer["error_code"] == "INTERNAL"
    assert answer["error_detail"]["stage"] == "denoise"
    assert "/root" not in str(answer)
    assert "Traceback" not in str(answer)


@pytest.mark.parametrize("thing", [None, 3, "x", [], {}, {"id": 5}, {"id": ""}, {"input": None}])
def test_anything_becomes_an_answer(thing):
    worker, _ = make_worker(FakeJobs())
    answer = asyncio.run(worker.handle(thing))
    assert isinstance(answer["error"], str)
    assert answer["error_detail"]["request_id"]


def test_updates_are_over_before_the_answer():
    jobs, told = FakeJobs(), []
    worker, _ = make_worker(jobs, send=lambda event, payload: told.append((event, payload)))
    asyncio.run(worker.handle(event("a", "reports")))
    assert [payload["stage"] for _, payload in told] == ["fetch", "denoise", "upload"]
    assert all(event["id"] == payload["request_id"] == "a" for event, payload in told)


class _Signals:
    """A worker that took a signal handler over from somebody."""

    def __init__(self, jobs, clock=None):
        self.before = signal.signal(signal.SIGTERM, self.told)
        self.heard: list[int] = []
        self.worker, _ = make_worker(jobs, signals=True, clock=clock or Clock())

    def told(self, number, frame):
        self.heard.append(number)

    def close(self):
        signal.signal(signal.SIGTERM, self.before)


def test_sigterm_stops_a_long_job_and_goes_on_to_the_sdk():
    jobs = FakeJobs()
    signals = _Signals(jobs)

    async def scene():
        task = asyncio.create_task(signals.worker.handle(event("a", "until_stopped")))
        await seen(jobs.started)
        signal.raise_signal(signal.SIGTERM)
        answer = await task
        return answer, await signals.worker.handle(event("b", "quickly"))

    try:
        stopped, later = asyncio.run(scene())
    finally:
        signals.close()
    assert signals.heard == [signal.SIGTERM]
    assert stopped["error_code"] == later["error_code"] == "WORKER_STOPPING"
    assert jobs.events == ["start a", "end a"], "no job is taken any more"


@pytest.mark.parametrize(
    ("spent_s", "late_s", "ends"),
    [
        (10, 0, "success"),
        (900, 0, "WORKER_STOPPING"),
        (10, 29, "success"),
        (10, 30, "WORKER_STOPPING"),  # the estimate was wrong: no more time than was given
    ],
)
def test_sigterm_lets_a_job_end_that_is_nearly_done(spent_s, late_s, ends):
    jobs, clock = FakeJobs(), Clock()
    signals = _Signals(jobs, clock)

    def nearly(request, flag, progress):
        with progress.stage("sample"):
            clock.now += spent_s
            progress.step(99, 100)  # 84 percent of the whole
            jobs.started.set()
            assert jobs.go_on.wait(WAIT_S)
            clock.now += late_s
            progress.step(100, 100)
        return {"status": "success"}

    jobs.nearly = nearly

    async def scene():
        task = asyncio.create_task(signals.worker.handle(event("a", "nearly")))
        await seen(jobs.started)
        signal.raise_signal(signal.SIGTERM)
        jobs.go_on.set()
        return await task

    try:
        answer = asyncio.run(scene())
    finally:
        signals.close()
    assert answer.get("error_code", answer.get("status")) == ends


def test_sigterm_between_jobs_ends_a_process_that_nobody_else_ends():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker, _ = make_worker(FakeJobs(), signals=True)
    try:
        asyncio.run(worker.handle(event("a", "quickly")))
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
