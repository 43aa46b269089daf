"""Bad command lines of every kind: an exit code of the right kind, one line, nothing left behind.

Each case runs the real argument, file and media checks. What lies behind them is a fake that
reads the inputs as the service does, so that damaged files are found without any model.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_media import SIZE, fake_result, write_image, write_video
from xicon_infer.job import Job
from xicon_infer.job_fields import FIELDS
from xicon_infer.media.image import load_image
from xicon_infer.media.video import probe
from xicon_infer.pose.track import load_tracks
from xicon_infer.run import main
from xicon_infer.types import Progress, Result

REQUEST, MEDIA, WEIGHTS = {2}, {3}, {5}

# Words are added to a good command line; {d} is the folder with the files of `folder`.
CASES: list[tuple[list[str], set[int]]] = [
    # flags that do not exist, or are broken
    (["--widht", "512"], REQUEST),
    (["--"], REQUEST),
    (["--", "x"], REQUEST),
    (["-"], REQUEST),
    (["-x"], REQUEST),
    (["--=5"], REQUEST),
    (["--\u00e9t\u00e9"], REQUEST),
    (["\U0001f57a"], REQUEST),
    (["--width"], REQUEST),
    (["--width", "--height"], REQUEST),
    (["--sheet=1"], REQUEST),
    (["--no-width"], REQUEST),
    (["dance"], REQUEST),
    (["doctor"], REQUEST),
    (["@file"], REQUEST),
    (["--input", "request.json"], REQUEST),
    # numbers
    (["--width", ""], REQUEST),
    (["--width", "nan"], REQUEST),
    (["--width", "512.0"], REQUEST),
    (["--width", "5e2"], REQUEST),
    (["--width", "-512"], REQUEST),
    (["--width", "0"], REQUEST),
    (["--width", "500"], REQUEST),
    (["--width", "1e999"], REQUEST),
    (["--width", "9" * 5000], REQUEST),
    (["--width", "0x200"], REQUEST),
    (["--width", "\u0665\u0661\u0662"], REQUEST),
    (["--width", "5_12"], REQUEST),
    (["--width", "1920", "--height", "1920"], REQUEST),
    (["--steps", "0"], REQUEST),
    (["--steps", "1.5"], REQUEST),
    (["--cfg", "nan"], REQUEST),
    (["--cfg", "inf"], REQUEST),
    (["--cfg", "-inf"], REQUEST),
    (["--cfg", "1e400"], REQUEST),
    (["--cfg", "1,5"], REQUEST),
    (["--shift", "0"], REQUEST),
    (["--seed", "-2"], REQUEST),
    (["--seed", str(2**64)], REQUEST),
    (["--seed", "random"], REQUEST),
    (["--fps", "0"], REQUEST),
    (["--fps", "sauce"], REQUEST),
    (["--num-frames", "482"], REQUEST),
    (["--pose-start", "1", "--pose-end", "0"], REQUEST),
    (["--context-overlap", "160"], REQUEST),
    (["--crf", "52"], REQUEST),
    (["--tile", "--tile-height", "100"], REQUEST),
    # choices and text
    (["--pipeline", "steady-dancer"], REQUEST),
    (["--pipeline", "wan-t2v"], REQUEST),
    (["--pipeline", ""], REQUEST),
    (["--preset", "fp16"], REQUEST),
    (["--scheduler", "DPM++_SDE"], REQUEST),
    (["--attention", "sageattn"], REQUEST),
    (["--pose-rope-t-offset", "2"], REQUEST),
    (["--prompt", "x" * 4001], REQUEST),
    (["--prompt", "\udc80"], REQUEST),
    (["--lora", ""], REQUEST),
    (["--lora", "a:9"], REQUEST),
    (["--lora", "a:nan"], REQUEST),
    (["--lora", "a", "--lora", "none"], REQUEST),
    (["--lora", "a"] * 5, REQUEST),
    # who is found and followed
    (["--body", "smpl"], REQUEST),
    (["--body", ""], REQUEST),
    (["--detector", "yolov8n"], REQUEST),
    (["--detector", ".pt"], REQUEST),
    (["--detector", ""], REQUEST),
    (["--detector", "{d}/text.png"], REQUEST),
    (["--detector", "{d}/nowhere.pt"], WEIGHTS),
    (["--detector", "{d}/folder.pt"], WEIGHTS),
    (["--detector", "{d}/" + "x" * 3000 + ".onnx"], WEIGHTS),
    (["--tracker", "botsort"], REQUEST),
    (["--tracker", "deepsort", "--detector", "a.pt"], REQUEST),
    (["--keypoint-model", "vitpose-g"], REQUEST),
    (["--keypoint-decode", "UDP"], REQUEST),
    (["--subject", "-1"], REQUEST),
    (["--subject", "1.0"], REQUEST),
    (["--subject", "\u0665"], REQUEST),
    (["--subject", "01"], REQUEST),
    (["--subject", "Largest"], REQUEST),
    (["--subject", "auto\n"], REQUEST),
    (["--persons", "3"], REQUEST),
    (["--persons", "0"], REQUEST),
    (["--smooth", "1.01"], REQUEST),
    (["--smooth", "nan"], REQUEST),
    (["--align", "on"], REQUEST),
    (["--pose-cache=no"], REQUEST),
    (["--overlay"], REQUEST),
    (["--pipeline", "pose"], REQUEST),
    # files
    (["--image", ""], REQUEST),
    (["--image", " "], REQUEST),
    (["--image", "{d}/nowhere.png"], MEDIA),
    (["--image", "{d}"], MEDIA),
    (["--image", "/dev/null"], MEDIA),
    (["--image", "{d}/" + "x" * 5000], MEDIA),
    (["--image", "{d}/text.png"], MEDIA),
    (["--image", "{d}/empty"], MEDIA),
    (["--image", "{d}/pose.mp4"], MEDIA),
    (["--image", "{d}/cut.png"], MEDIA),
    (["--image", "https://example.com/a.png"], MEDIA),
    (["--image", "{d}/\u540d\u524d \U0001f57a.png"], MEDIA),
    (["--pose-video", "{d}/ref.png"], MEDIA),
    (["--pose-video", "{d}/text.png"], MEDIA),
    (["--pose-video", "{d}/empty"], MEDIA),
    (["--pose-video", "{d}/half.mp4"], MEDIA),
    (["--track", "{d}/pose.mp4"], REQUEST),
    (["--video", "{d}/nowhere.mp4"], MEDIA),
    (["--models-dir", "{d}/ref.png"], WEIGHTS),
    (["--models-dir", "{d}/nowhere"], WEIGHTS),
    (["--lora", "{d}/nowhere.safetensors"], WEIGHTS),
    # outputs
    (["--output", "{d}/a.avi"], REQUEST),
    (["--output", "{d}"], REQUEST),
    (["--output", ""], REQUEST),
    (["--output", "{d}/folder.mp4"], MEDIA),
    (["--output", "{d}/nowhere/out.mp4"], MEDIA),
    (["--output", "{d}/pose.mp4"], MEDIA),
    (["--output", "{d}/pose.mp4", "--overwrite"], MEDIA),
    (["--output", "{d}/ref.mp4", "--sheet", "--overwrite"], MEDIA),
    (["--output", "{d}/" + "x" * 5000 + ".mp4"], MEDIA),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    picture = write_image(path / "ref.png").read_bytes()
    video = write_video(path / "pose.mp4").read_bytes()
    (path / "text.png").write_text("this is no picture")
    (path / "empty").write_bytes(b"")
    (path / "cut.png").write_bytes(picture[: len(picture) // 2])
    (path / "half.mp4").write_bytes(video[:40])
    (path / "folder.mp4").mkdir()
    (path / "folder.pt").mkdir()
    np.savez(path / "other.npz", a=np.zeros(3))
    return path


def reading_job(job: Job, progress: Progress) -> Result:
    """Opens every input of a job."""
    if job.image is not None:
        load_image(job.image)
    if job.pose_video is not None:
        probe(job.pose_video, field="pose_video")
    if job.track is not None:
        load_tracks(job.track)
    if job.video is not None:
        probe(job.video)
    return fake_result(job.output)


def good_words(folder: Path) -> list[str]:
    files = ["--image", str(folder / "ref.png"), "--pose-video", str(folder / "pose.mp4")]
    return [*files, "--output", str(folder / "out.mp4"), *SIZE, "--preset", "tiny", "--quiet"]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refusal(
    words: list[str], folder: Path, allowed: set[int], capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(folder)
    code = main(words, run_job=reading_job)
    out, err = capfd.readouterr()
    assert code in allowed, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("]\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert snapshot(folder) == before


def test_the_good_command_line_is_good(folder: Path) -> None:
    assert main(good_words(folder), run_job=reading_job) == 0


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(("added", "allowed"), CASES, ids=lambda v: repr(v)[:50])
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
def test_bad_words(
    added: list[str],
    allowed: set[int],
    dry: bool,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [word.replace("{d}", str(folder)) for word in added]
    extra = ["--dry-run"] if dry else []
    check_refusal([*good_words(folder), *extra, *words], folder, allowed, capfd)


# Words added to `--pipeline pose --video`; no reference is given.
POSE_CASES: list[tuple[list[str], set[int]]] = [
    (["--prompt", "x"], REQUEST),
    (["--seed", "1"], REQUEST),
    (["--preset", "tiny"], REQUEST),
    (["--lora", "a"], REQUEST),
    (["--cfg", "2"], REQUEST),
    (["--tile"], REQUEST),
    (["--pose-render", "half"], REQUEST),
    (["--pose-preview"], REQUEST),
    (["--save-track"], REQUEST),
    (["--pose-video", "{d}/pose.mp4"], REQUEST),
    (["--track", "{d}/other.npz"], REQUEST),
    (["--align", "auto"], REQUEST),
    (["--align", "wide"], REQUEST),
    (["--pose-fit", "stretch"], REQUEST),
    (["--video", "{d}/text.png"], MEDIA),
    (["--video", "{d}/empty"], MEDIA),
    (["--image", "{d}/nowhere.png"], MEDIA),
    (["--image", "{d}/text.png"], MEDIA),
    (["--overlay", "--output", "{d}/folder.mp4"], MEDIA),
]


@pytest.mark.parametrize(("added", "allowed"), POSE_CASES, ids=lambda v: repr(v)[:50])
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
def test_bad_words_of_pipeline_pose(
    added: list[str],
    allowed: set[int],
    dry: bool,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--pipeline", "pose", "--video", str(folder / "pose.mp4"), *SIZE, "--quiet"]
    words += ["--output", str(folder / "out.mp4")]
    assert main([*words, "--overlay"], run_job=reading_job) == 0
    capfd.readouterr()
    words += [word.replace("{d}", str(folder)) for word in added]
    check_refusal([*words, *(["--dry-run"] if dry else [])], folder, allowed, capfd)


@pytest.mark.parametrize("name", ["other.npz", "text.png", "empty"])
def test_bad_tracks(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--image", str(folder / "ref.png"), "--track", str(folder / name), "--quiet"]
    words += ["--output", str(folder / "out.mp4")]
    check_refusal(words, folder, MEDIA, capfd)
    check_refusal([*words, "--dry-run"], folder, MEDIA, capfd)


def garbage(rng: random.Random) -> str:
    letters = "abc019.:-+ \t\n\"'%{}$\u00e9\u540d\U0001f57a\udc80\x1b"
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("seed", range(60))
def test_random_words_never_end_in_a_bug(
    seed: int, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    words = good_words(folder)
    for _ in range(rng.randint(1, 3)):
        flag = rng.choice([*rng.choice(FIELDS).flags, "--" + garbage(rng), garbage(rng)])
        words.insert(rng.randint(0, len(words)), flag)
        if rng.random() < 0.7:
            words.insert(rng.randint(0, len(words)), garbage(rng))
    words += ["--output", str(folder / "out.mp4"), "--dry-run"]
    before = snapshot(folder)
    code = main(words)
    out, err = capfd.readouterr()
    assert code in (0, 2, 3, 4, 5), err
    assert bool(err) == (code != 0)
    assert not err or (err.startswith("error: ") and err.count("\n") == 1)
    assert bool(out) == (code == 0)
    assert snapshot(folder) == before


def test_a_value_of_the_wrong_type_for_every_option(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"path": "", "text": "\udc80", "loras": ":", "switch": None}
    for field in FIELDS:
        value = values.get(field.kind, "garbage")
        words = [field.flags[0]] if value is None else [field.flags[0], value]
        if value is None:
            words = [f"{field.flags[0]}=yes"]
        check_refusal([*good_words(folder), *words], folder, REQUEST, capfd)
