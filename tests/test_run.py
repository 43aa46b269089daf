"""The command line: help, flags, dry run, JSON, exit codes, Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli_media import SIZE, fake_result, fake_run_job, write_image, write_video
from tests.job_examples import pipeline_of
from xicon_infer import errors
from xicon_infer.job import Job
from xicon_infer.job_field import PIPELINES, Field
from xicon_infer.job_fields import EXAMPLES, FIELDS, GROUPS
from xicon_infer.job_flags import jobs_of, parse, run_parser
from xicon_infer.run import main
from xicon_infer.types import Progress, Result

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "av", "PIL", "cv2", "rich", "transformers", "diffusers", "scipy", "safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    write_image(path / "ref.png")
    write_video(path / "pose.mp4")
    return path


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> list[str]:
    files = ["--image", str(folder / "ref.png"), "--pose-video", str(folder / "pose.mp4")]
    return [*files, "--output", str(tmp_path / "out.mp4"), "--preset", "tiny", *SIZE]


class Spy:
    """Keeps the job it was given."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, job: Job, progress: Progress) -> Result:
        self.jobs.append(job)
        return fake_result(job.output)


def in_subprocess(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def modules_after(argv: list[str]) -> set[str]:
    code = (
        "import contextlib, io, sys\nfrom xicon_infer.run import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): code = main({argv!r})\n"
        "print(code, *sorted(sys.modules))"
    )
    out = in_subprocess(code)
    code_word, *names = out.stdout.split()
    assert (code_word, out.stderr) == ("0", "")
    return {name.split(".")[0] for name in names}


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after(["--help"])
    assert not loaded & HEAVY
    # numpy only if the shared data types themselves load it.
    types = in_subprocess("import sys, xicon_infer.types; print('numpy' in sys.modules)")
    assert ("numpy" in loaded) == (types.stdout.strip() == "True")


def test_help_has_groups_every_flag_and_an_example_per_pipeline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{group}:\n" in text for group in (*GROUPS, "shell"))
    assert all(flag in text for field in FIELDS for flag in field.flags)
    assert set(EXAMPLES) == set(PIPELINES)
    assert all(command in text for command in EXAMPLES.values())


def test_the_example_of_every_pipeline_parses() -> None:
    for name, command in EXAMPLES.items():
        program, sub, *rest = shlex.split(command)
        assert (program, sub) == ("xicon-infer", "run")
        options = parse(run_parser(), rest)
        assert options["pipeline"] == name
        assert jobs_of(options)[0].warnings == ()


def test_reference_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "reference_cli.py")
    assert spec and spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.reference(), (
        "run: python docs/reference_cli.py"
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from xicon_infer import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xicon-infer {__version__}\n"


def other_value(field: Field) -> tuple[list[str], Any]:
    """Returns words that set an option to something else than its default, and that value."""
    flag, pipeline = field.flags[-1], pipeline_of(field)
    multiple = field.multiple_for(pipeline)
    if field.kind == "switch":
        wanted = not field.default_for(pipeline)
        return [flag if wanted else flag.replace("--", "--no-", 1)], wanted
    if field.name == "preset":
        return [flag, "bf16"], "bf16"
    if field.kind == "path":
        return [flag, __file__], Path(__file__)
    if field.kind == "choice":
        value = next(c for c in reversed(field.choices) if c != field.default_for(pipeline))
        return [flag, str(value)], value
    if field.pattern:
        return [flag, "largest"], "largest"
    if field.kind in ("integer", "number"):
        value = {
            "persons": 2,
            "pose_start": 0.25,
            "ref_end": 0.75,
            "tile_height": 512,
            "tile_width": 512,
            "st_cond_cfg": 0.2,
            "end_cond_cfg": 0.6,
        }.get(field.name, field.low + (multiple if multiple > 1 else 1))
        value = value if field.kind == "number" else int(value)
        return [flag, str(value)], value
    return [flag, "something"], "something"


def settable() -> list[Field]:
    """Returns the options that go with a pose video; the others have tests of their own."""
    files = ("image", "pose_video", "track", "video", "output", "models_dir", "pipeline", "loras")
    files = (*files, "end_image", "negative_pose")
    found = ("detector", "tracker", "overlay", "pose_align", "condition_guide_scale")
    return [field for field in FIELDS if field.name not in (*files, *found)]


@pytest.mark.parametrize("field", settable(), ids=lambda f: f.name)
def test_every_flag_reaches_the_job(field: Field, words: list[str]) -> None:
    given, value = other_value(field)
    spy = Spy()
    name = pipeline_of(field)
    if name != "scail":
        given = ["--pipeline", name, *given]
    if field.name == "step_cache":  # fewer steps differ too much from one another
        given = ["--num-inference-steps", "12", *given]
    assert main([*words, *given, "--quiet"], run_job=spy) == 0
    assert getattr(spy.jobs[0], field.name) == value


def test_files_reach_the_job(words: list[str], folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    more = ["--video", str(folder / "pose.mp4"), "--models-dir", str(folder)]
    assert main([*words, *more, "--lora", "a:0.5", "--lora", "b", "--quiet"], run_job=spy) == 0
    job = spy.jobs[0]
    assert (job.image, job.pose_video) == (folder / "ref.png", folder / "pose.mp4")
    assert (job.video, job.models_dir) == (folder / "pose.mp4", folder)
    assert job.output == tmp_path / "out.mp4"
    assert [(lora.name, lora.strength) for lora in job.loras] == [("a", 0.5), ("b", 1.0)]


def test_help_says_who_reads_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "factor on the reference latents (only scail) (default: 1.0)" in text
    assert "most driving frames, 0 for all (only scail, steady_dancer, pose)" in text


def test_run_may_be_named_or_not(words: list[str]) -> None:
    spy = Spy()
    assert main([*words, "--quiet"], run_job=spy) == 0
    assert main(["run", *words, "--quiet"], run_job=spy) == 0
    assert spy.jobs[0] == spy.jobs[1]


def test_module_and_console_script_are_the_same(words: list[str]) -> None:
    module = [sys.executable, "-m", "xicon_infer.run", *words, "--dry-run", "--json"]
    script = f"import sys\nfrom xicon_infer.run import main\nsys.exit(main({['run', *module[3:]]}))"
    first = subprocess.run(module, capture_output=True, text=True, cwd=ROOT)
    second = in_subprocess(script)
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout)
    assert json.loads(first.stdout)["num_frames"] == 17


def test_dry_run_loads_no_torch_and_writes_nothing(words: list[str], tmp_path: Path) -> None:
    loaded = modules_after([*words, "--dry-run"])
    assert not loaded & {"torch", "transformers", "diffusers", "safetensors", "rich"}
    assert list(tmp_path.iterdir()) == []


def test_result_as_json_and_nothing_else(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"], run_job=fake_run_job) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["path"] == str(tmp_path / "out.mp4")
    assert result["fps"] == pytest.approx(29.97, abs=0.01)
    assert result["stages"] == [{"name": "sample", "seconds": 1.5, "peak_memory_bytes": 2**20}]
    assert result["outputs"] == {"report": str(tmp_path / "out.json")}


def test_result_for_a_reader(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words, run_job=fake_run_job) == 0
    out, err = capfd.readouterr()
    summary = "17 frames, 128x192, 29.97 fps, seed 7, 1.5 s"
    assert out.splitlines() == [
        f"{tmp_path / 'out.mp4'}: {summary}",
        f"{tmp_path / 'out.json'}: report",
    ]
    assert "sample" in err
    assert "warning: told" in err


def test_quiet_prints_nothing(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--quiet"], run_job=fake_run_job) == 0
    assert capfd.readouterr() == ("", "")


def raising(error: BaseException) -> Any:
    def run_job(job: Job, progress: Progress) -> Result:
        raise error

    return run_job


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("a"), 2),
        (errors.MediaError("a"), 3),
        (errors.PoseError("a"), 4),
        (errors.WeightsError("a"), 5),
        (errors.BackendUnavailable("a"), 6),
        (errors.OutOfMemory("a"), 6),
        (errors.Cancelled("a"), 130),
        (KeyboardInterrupt(), 130),
        (errors.XiconError("a"), 1),
        (RuntimeError("a"), 1),
    ],
)
def test_exit_code_and_one_line_per_error(
    error: BaseException, code: int, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--quiet"], run_job=raising(error)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("]\n")
    assert err.count("\n") == 1


def test_error_as_json(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json", "--width", "100"]) == 2
    out, err = capfd.readouterr()
    message = "'width' must be between 128 and 1920, got 100"
    assert json.loads(out) == {
        "error": f"{message} [OUT_OF_RANGE]",
        "error_code": "OUT_OF_RANGE",
        "error_detail": {"code": "OUT_OF_RANGE", "message": message, "field": "width"},
    }
    assert err == f"error: {message} [OUT_OF_RANGE]\n"


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_traceback_only_when_asked(
    how: str,
    words: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XICON_DEBUG", raising=False)
    assert main(words, run_job=raising(ValueError("boom"))) == 1
    assert "Traceback" not in capfd.readouterr().err
    if how == "environment":
        monkeypatch.setenv("XICON_DEBUG", "1")
    asked = [*words, "--debug"] if how == "flag" else words
    assert main(asked, run_job=raising(ValueError("boom"))) == 1
    assert "ValueError: boom" in capfd.readouterr().err


def test_control_characters_do_not_reach_the_terminal(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words, run_job=raising(errors.MediaError("a\x1b[2Jb\nc\udcff"))) == 3
    assert capfd.readouterr().err == "error: a?[2Jb c? [MEDIA_CORRUPT]\n"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--widht", "512"], "unknown option --widht; did you mean --width?"),
        (["--zzz"], "unknown option --zzz; see --help"),
        (["dance"], "unexpected word 'dance'"),
        (["--width"], "argument --width: expected one argument"),
        (["--wid", "512"], "unknown option --wid"),
        (["--tile=yes"], "argument --tile/--no-tile"),
        ([], "Missing 'image'"),
    ],
)
def test_wrong_words(given: list[str], part: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert part in capfd.readouterr().err


SLOW = """
import pathlib, sys, time
from xicon_infer.run import main
def slow(job, progress):
    part = job.output.with_suffix('.part')
    try:
        with progress.stage('sample'):
            part.write_bytes(b'half')
            for step in range(600):
                progress.step(step, 600)
                time.sleep(0.05)
    finally:
        part.unlink()
sys.exit(main(sys.argv[1:], run_job=slow))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_stops_within_a_step_and_leaves_nothing(
    sent: signal.Signals, words: list[str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A test runner started in the background hands its children an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr
        while not (tmp_path / "out.part").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(sent)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: stopped; no output was written [CANCELLED]"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
