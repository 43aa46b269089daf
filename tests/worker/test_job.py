"""One job from its event to its answer, with the tiny networks: files, faults, what is told."""

from __future__ import annotations

import asyncio
import base64
import json
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.worker.fakes import Clock
from xicon_infer.errors import OutOfMemory
from xicon_infer.media.video import probe
from xicon_infer.media.write import write_png, write_video
from xicon_infer.request import RequestContext
from xicon_infer.service import run_job
from xicon_infer.settings import read_settings
from xicon_infer.worker import Limits, Worker
from xicon_infer.worker_context import Inputs
from xicon_infer.worker_files import files_of
from xicon_infer.worker_job import Parts, RealJobs
from xicon_infer.worker_log import JsonLog
from xicon_infer.worker_metrics import Metrics
from xicon_infer.worker_refresh import RefreshPolicy, Usage
from xicon_infer.worker_session import WatchedSession

T2V = {"mode": "wan_t2v", "prompt": "a fox", "width": 128, "height": 128, "num_frames": 1}


@pytest.fixture(scope="module")
def session() -> WatchedSession:
    return WatchedSession()


class Bench:
    """A worker in this process, with the real intake, recipe and delivery."""

    def __init__(self, folder, session, env=None, **parts):
        self.folder, self.session = folder, session
        given = {
            "XICON_PRESET": "tiny",
            "XICON_TMP": str(folder / "tmp"),
            "NETWORK_VOLUME_PATH": str(folder / "volume"),
        } | (env or {})
        settings = read_settings(given)
        self.written: list[str] = []
        self.log = JsonLog(self.written.append, level="DEBUG")
        self.metrics = Metrics()
        self.parts = Parts(
            settings=settings,
            files=files_of(settings, Inputs(settings.input_roots)),
            session=session,
            run=parts.pop("run", lambda job, progress: run_job(job, progress, session)),
            context=lambda event: RequestContext(modes=settings.modes),
            refresh=RefreshPolicy(always=False, max_jobs=0, usage=lambda: Usage(0, 10**12)),
            log=self.log,
            metrics=self.metrics,
            **parts,
        )
        self.worker = Worker(
            RealJobs(self.parts),
            log=self.log,
            metrics=self.metrics,
            limits=Limits(settings.job_timeout_s, 60),
            clock=self.parts.clock,
        )

    def answer(self, given, name="job-1"):
        return asyncio.run(self.worker.handle({"id": name, "input": given}))

    @property
    def leftovers(self) -> list[str]:
        tmp = self.folder / "tmp"
        return [p.name for p in tmp.iterdir()] if tmp.exists() else []

    def events(self, name: str) -> list[dict]:
        return [line for line in map(json.loads, self.written) if line["event"] == name]


@pytest.fixture
def bench(tmp_path, session) -> Bench:
    return Bench(tmp_path, session)


def video_of(answer, folder):
    path = folder / "answer.mp4"
    path.write_bytes(base64.b64decode(answer["videos"][0]["data"]))
    return path


def inline(path) -> str:
    kind = "image/png" if path.suffix == ".png" else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_png(folder / "ref.png", np.full((128, 128, 3), 128, np.uint8))
    write_video(folder / "pose.mp4", np.zeros((5, 128, 128, 3), np.uint8), fps=Fraction(16))
    return {"image": inline(folder / "ref.png"), "pose_video": inline(folder / "pose.mp4")}


def test_a_request_becomes_a_video_with_a_whole_record(bench, tmp_path):
    given = T2V | {"num_frames": 5, "steps": 2, "seed": 11, "metadata": {"mine": 1}}
    answer = bench.answer(given)
    assert answer["status"] == "success"
    assert (answer["errors"], answer["warnings"]) == ([], [])
    info = probe(video_of(answer, tmp_path))
    assert (info.width, info.height, info.num_frames) == (128, 128, 5)
    told = answer["metadata"]
    assert (told["seed"], told["steps"], told["frames"], told["fps"]) == (11, 2, 5, 16.0)
    assert told["request_id"] == "job-1"
    assert told["client"] == {"mine": 1}
    assert told["model"] == "wan_t2v/tiny"
    assert told["settings"]["seed"] == 11
    assert {"fetch", "text", "denoise", "vae", "encode", "upload", "total"} <= set(told["timings"])
    assert told["timings"]["total"] >= told["timings"]["denoise"] > 0
    assert {"transformer", "vae", "text_encoder"} <= set(told["weights"])
    assert all(stage["peak_memory_bytes"] > 0 for stage in told["stages"])
    assert told["attention"] in ("flash", "math")
    assert "prompt" not in told["settings"]
    assert str(tmp_path) not in json.dumps(told)
    assert bench.leftovers == []


def test_the_file_names_its_software_only(bench, tmp_path):
    path = video_of(bench.answer(T2V | {"steps": 1, "prompt": "unheard words"}), tmp_path)
    with av.open(str(path)) as container:
        found = dict(container.metadata)
    assert found["software"].startswith("xicon-infer")
    assert b"unheard" not in path.read_bytes()
    assert "comment" not in found


def test_settings_go_into_the_file_where_the_owner_wants_it(tmp_path, session):
    bench = Bench(tmp_path, session, {"XICON_EMBED_PARAMS": "1"})
    path = video_of(bench.answer(T2V | {"steps": 1, "seed": 3}), tmp_path)
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["comment"])["seed"] == 3


def test_only_the_first_job_is_cold(bench):
    cold = [bench.answer(T2V | {"steps": 1}, f"j{n}")["metadata"]["cold_start"] for n in (1, 2)]
    assert cold == [True, False]


def test_media_inside_the_request_and_another_users_files(bench, media):
    given = media | {"mode": "scail", "width": 128, "height": 128, "steps": 1, "seed": 1}
    answer = bench.answer(given)
    assert answer["status"] == "success", answer
    assert answer["metadata"]["frames"] == 5
    assert bench.leftovers == []
    accepted = bench.events("job.accepted")[0]
    assert accepted["sources"] == {"image": "base64", "pose_video": "base64"}


def test_a_pose_video_is_returned_when_it_is_asked_for(bench, media):
    given = media | {"width": 128, "height": 128, "steps": 1, "output": {"return_pose_video": True}}
    answer = bench.answer(given)
    assert [video["role"] for video in answer["videos"]] == ["result", "pose"]


def test_the_old_answer_has_no_list(bench):
    answer = bench.answer(T2V | {"steps": 1, "response_format": "legacy_video"})
    assert base64.b64decode(answer["video"])[4:8] == b"ftyp"
    assert "videos" not in answer


def test_a_cancel_in_the_middle_of_denoising_ends_before_the_next_step(bench):
    steps: list[int] = []

    async def scene():
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(bench.worker.handle({"id": "a", "input": T2V | {"steps": 50}}))

        def run(job, progress):
            original = progress.step

            def step(done, total, unit="step"):
                if progress.current == "denoise":
                    steps.append(done)
                    if done == 2:
                        loop.call_soon_threadsafe(task.cancel)
                        while not bench.worker._running.flag.code:
                            pass
                original(done, total, unit)

            progress.step = step
            return run_job(job, progress, bench.session)

        bench.parts.run = run
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert steps == [1, 2]
    assert bench.leftovers == []
    assert [event["requestId"] for event in bench.events("job.cancelled")] == ["a"]


def test_out_of_memory_is_told_with_the_same_noise(tmp_path, session):
    tries = []

    def run(job, progress):
        tries.append(job)
        if len(tries) < 3:
            raise OutOfMemory("no room")
        return run_job(job, progress, session)

    bench = Bench(tmp_path, session, run=run)
    answer = bench.answer(T2V | {"steps": 1})
    assert [w["code"] for w in answer["warnings"] if w["code"] == "MEMORY_FALLBACK"] == [
        "MEMORY_FALLBACK"
    ] * 2
    assert len({job.seed for job in tries}) == 1
    assert answer["metadata"]["seed"] == tries[0].seed >= 0
    assert len(bench.events("gpu.oom")) == 2
    assert bench.metrics.get("xicon_gpu_oom_total") == 2


@pytest.mark.parametrize(
    ("error", "code", "fresh"),
    [
        (OutOfMemory("no room"), "GPU_OOM", False),
        (RuntimeError("CUDA error: device-side assert triggered"), "GPU_ERROR", True),
        (KeyError("bug"), "INTERNAL", False),
    ],
)
def test_what_fails_is_answered_and_cleaned_up(tmp_path, session, error, code, fresh):
    def run(job, progress):
        with progress.stage("sample"):
            raise error

    bench = Bench(tmp_path, session, run=run)
    answer = bench.answer(T2V)
    assert answer["error_code"] == code
    assert answer["error"].endswith(f"[{code}]")
    assert answer.get("refresh_worker", False) is fresh
    assert answer["error_detail"]["stage"] == "denoise"
    assert bench.leftovers == []
    (failed,) = bench.events("job.failed")
    assert failed["code"] == code
    assert ("traceback" in failed) is (code != "GPU_OOM")
    assert "Traceback" not in json.dumps(answer)


def test_secrets_are_neither_logged_nor_answered(tmp_path, session):
    secret = "s3cr3t-t0ken"
    bench = Bench(tmp_path, session, {"XICON_ALLOW_PRIVATE_URLS": "1"})
    given = {
        "image": f"http://127.0.0.1:8080/a.png?token={secret}",
        "pose_video": f"http://127.0.0.1:8080/b.mp4?token={secret}",
        "prompt": f"a prompt with {secret}",
    }
    answer = bench.answer(given)
    assert answer["error_code"].startswith("FETCH_")
    assert secret not in json.dumps(answer)
    assert secret not in "".join(bench.written)


def test_prompts_are_logged_only_where_the_owner_wants_it(tmp_path, session):
    for allowed in ("0", "1"):
        bench = Bench(tmp_path, session, {"XICON_LOG_PROMPTS": allowed})
        bench.answer(T2V | {"dry_run": True, "prompt": "hello words"})
        assert ("hello words" in "".join(bench.written)) is (allowed == "1")


@pytest.mark.parametrize("stage", ["request", "result"])
def test_the_owners_judge_ends_a_job(tmp_path, session, stage):
    asked = []

    def judge(when, request, video):
        asked.append((when, request["prompt"], video is not None and video.exists()))
        return "not here" if when == stage else None

    bench = Bench(tmp_path, session, judge=judge)
    answer = bench.answer(T2V | {"steps": 1})
    assert answer["error_code"] == "CONTENT_REJECTED"
    assert "not here" in answer["error"]
    assert asked == [("request", "a fox", False), ("result", "a fox", True)][: len(asked)]
    assert len(asked) == (1 if stage == "request" else 2)
    assert bench.leftovers == []


def test_a_broken_judge_lets_nothing_out(tmp_path, session):
    bench = Bench(tmp_path, session, judge=lambda *given: 1 / 0)
    assert bench.answer(T2V)["error_code"] == "INTERNAL"


def test_a_result_too_large_goes_to_the_volume(tmp_path, session):
    bench = Bench(tmp_path, session, {"XICON_MAX_INLINE_BYTES": "6000"})
    (tmp_path / "volume").mkdir()
    (video,) = bench.answer(T2V | {"steps": 1}, "../../x")["videos"]
    assert video["type"] == "path"
    files = list(tmp_path.rglob("*.mp4"))
    assert len(files) == 1, "the job's own folder is gone"
    assert files[0].is_relative_to(tmp_path / "volume")


def test_a_result_that_seldom_fits_is_foretold(tmp_path, session):
    bench = Bench(tmp_path, session, {"XICON_MAX_INLINE_BYTES": "100"})
    (tmp_path / "volume").mkdir()
    codes = [w["code"] for w in bench.answer(T2V | {"steps": 1})["warnings"]]
    assert codes == ["LIKELY_TOO_LARGE"]


def test_health_has_the_numbers_of_the_worker(bench):
    bench.answer(T2V | {"steps": 1})
    bench.answer({"mode": "nothing"}, "bad")
    health = bench.answer({"action": "health"}, "h")
    assert health["status"] == "healthy"
    assert health["jobs_done"] == 2
    assert health["last_error"] == "INVALID_CHOICE"
    assert health["metrics"]['xicon_jobs_total{mode="wan_t2v",outcome="success"}'] == 1
    assert "xicon_stage_seconds_total" in bench.metrics.prometheus_text()


def test_a_dry_run_touches_nothing(tmp_path, session):
    bench = Bench(tmp_path, session, run=lambda job, progress: pytest.fail("it ran"))
    answer = bench.answer(T2V | {"dry_run": True})
    assert answer["status"] == "valid"
    assert answer["request"]["width"] == 128
    assert bench.leftovers == []


def test_a_full_size_request_ends_by_its_time_limit(tmp_path, session):
    clock = Clock()

    def run(job, progress):
        with progress.stage("sample"):
            for step in range(job.num_inference_steps):
                clock.now += 40
                progress.step(step + 1, job.num_inference_steps)
        raise AssertionError("nothing stopped it")

    bench = Bench(tmp_path, session, run=run, clock=clock)
    answer = bench.answer(T2V | {"steps": 100, "num_frames": 481, "timeout_s": 600})
    assert answer["error_code"] == "JOB_TIMEOUT"


def test_the_first_frame_comes_along_on_request(bench, tmp_path):
    answer = bench.answer(T2V | {"output": {"return_first_frame": True}})
    (picture,) = answer["images"]
    assert (picture["format"], picture["role"]) == ("image/png", "first_frame")
    assert (picture["width"], picture["height"]) == (128, 128)
    raw = base64.b64decode(picture["data"])
    assert raw.startswith(b"\x89PNG")
    assert len(raw) == picture["size_bytes"]
    assert "images" not in bench.answer(T2V, name="job-2")


def test_flash_kernels_may_be_switched_off(tmp_path, session):
    plain = Bench(tmp_path, session, kernels=("flash", "math")).answer(T2V)
    assert plain["metadata"]["attention"] in ("flash", "math")
    without = Bench(tmp_path, session, {"ENABLE_FLASH_ATTN": "false"}, kernels=("flash", "math"))
    assert without.answer(T2V)["metadata"]["attention"] == "math"
