"""The command line: what is made of a film alone, and of several references."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli_media import SIZE, fake_result, write_image, write_video
from tests.test_run import Spy, modules_after
from xicon_infer.job import Job, outputs_for
from xicon_infer.run import main
from xicon_infer.types import Progress, Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    write_image(path / "ref.png")
    write_image(path / "other.png")
    (path / "more").mkdir()
    write_image(path / "more" / "ref.png")
    write_video(path / "pose.mp4")
    return path


def dance_words(folder: Path, tmp_path: Path) -> list[str]:
    return ["--video", str(folder / "pose.mp4"), "--output", str(tmp_path / "out.mp4"), *SIZE]


def test_two_files_are_enough(folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    words = [*dance_words(folder, tmp_path), "--image", str(folder / "ref.png"), "--quiet"]
    assert main(words, run_job=spy) == 0
    job = spy.jobs[0]
    assert (job.pipeline, job.finds_poses, job.aligns, job.warnings) == ("scail", True, True, ())


def test_options_of_finding_reach_the_job(folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    model = tmp_path / "mine.pt"
    model.write_bytes(b"x")
    words = [*dance_words(folder, tmp_path), "--pipeline", "pose", "--quiet"]
    words += ["--detector", str(model), "--tracker", "bytetrack", "--overlay", "--subject", "1"]
    assert main(words, run_job=spy) == 0
    job = spy.jobs[0]
    assert (job.detector_path, job.tracker, job.overlay) == (model, "bytetrack", True)
    assert (job.pipeline, job.subject, job.image, job.align) == ("pose", "1", None, "off")


def test_pose_alone_dry_and_its_summary(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*dance_words(folder, tmp_path), "--pipeline", "pose"]
    assert main([*words, "--dry-run"]) == 0
    assert "pose_body" in capfd.readouterr().out

    def run_job(job: Job, progress: Progress) -> Result:
        return replace(fake_result(job.output), settings=job.settings())

    assert main(words, run_job=run_job) == 0
    assert "seed" not in capfd.readouterr().out
    assert not modules_after([*words, "--dry-run"]) & {"torch", "onnxruntime", "ultralytics"}


def test_several_references_make_one_video_each(folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    images = [str(folder / "ref.png"), str(folder / "other.png"), str(folder / "more" / "ref.png")]
    words = [*dance_words(folder, tmp_path), "--image", *images, "--quiet"]
    assert main(words, run_job=spy) == 0
    assert [str(job.image) for job in spy.jobs] == images
    assert len({job.seed for job in spy.jobs}) == 1
    assert spy.jobs[0].seed >= 0, "one seed is drawn for all"
    assert [job.output.name for job in spy.jobs] == [
        "out.ref-1.mp4",
        "out.other.mp4",
        "out.ref-2.mp4",
    ]


def test_all_references_are_checked_before_the_first_job(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spy = Spy()
    images = [str(folder / "ref.png"), str(folder / "absent.png")]
    assert main([*dance_words(folder, tmp_path), "--image", *images], run_job=spy) == 3
    assert spy.jobs == []
    assert "absent.png does not exist" in capsys.readouterr().err


def test_results_of_several_references_are_a_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_job(job: Job, progress: Progress) -> Result:
        return replace(fake_result(job.output), settings=job.settings())

    words = [*dance_words(folder, tmp_path), "--image", str(folder / "ref.png")]
    assert main([*words, "--json"], run_job=run_job) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main([*words, str(folder / "other.png"), "--json"], run_job=run_job) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).name for one in found] == ["out.ref.mp4", "out.other.mp4"]
    assert main([*words, str(folder / "other.png"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("pipeline   scail") == 2


def test_names_of_outputs() -> None:
    paths = outputs_for(Path("a/out.mp4"), [Path("x/b.png"), Path("c.d.jpg"), Path("y/b.jpg")])
    assert [str(path) for path in paths] == ["a/out.b-1.mp4", "a/out.c.d.mp4", "a/out.b-2.mp4"]


def test_a_card_is_for_a_dry_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*dance_words(folder, tmp_path), "--image", str(folder / "ref.png"), "--gpu", "H100"]
    assert main(words, run_job=Spy()) == 2
    assert "needs --dry-run" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "card       H100" in capsys.readouterr().out


def test_a_workflow_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-workflow", "--help"]) == 0
    assert "import-workflow" in capsys.readouterr().out
    assert main(["import-workflow", str(tmp_path / "absent.json")]) != 0
    assert "absent.json" in capsys.readouterr().err


def test_references_may_be_given_one_by_one(folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    images = ["--image", str(folder / "ref.png"), "--image", str(folder / "other.png")]
    assert main([*dance_words(folder, tmp_path), *images, "--quiet"], run_job=spy) == 0
    assert [job.image.name for job in spy.jobs if job.image] == ["ref.png", "other.png"]


def test_a_damaged_reference_is_found_before_the_first_job(folder: Path, tmp_path: Path) -> None:
    spy = Spy()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG no picture")
    images = ["--image", str(folder / "ref.png"), str(bad)]
    assert main([*dance_words(folder, tmp_path), *images, "--quiet"], run_job=spy) == 3
    assert spy.jobs == []


def test_a_kernel_that_is_not_there_is_told_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pipeline", "wan_t2v", "--prompt", "a fox", "--preset", "tiny"]
    words += ["--attention", "flash3", "--output", str(tmp_path / "o.mp4")]
    assert main(words) == 6
    told = capsys.readouterr().err
    assert "flash3" in told
    assert "load models" not in told
