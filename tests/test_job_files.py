"""What `check_files` refuses before a job starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xicon_infer.errors import MediaError, WeightsError
from xicon_infer.job import Job, check_files, make_job


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name in ("ref.png", "dance.npz"):
        (tmp_path / name).write_bytes(b"x")
    return {
        "image": tmp_path / "ref.png",
        "track": tmp_path / "dance.npz",
        "output": tmp_path / "out.mp4",
    }


def job_with(values: dict[str, Any], **changed: Any) -> Job:
    return make_job({**values, **changed})


def test_good_files_pass(values: dict[str, Any]) -> None:
    check_files(job_with(values))


def test_names_of_the_outputs(values: dict[str, Any], tmp_path: Path) -> None:
    assert job_with(values).outputs() == {
        "video": tmp_path / "out.mp4",
        "report": tmp_path / "out.json",
    }
    more = job_with(values, sheet=True, pose_preview=True).outputs()
    assert (more["sheet"], more["pose"]) == (tmp_path / "out.png", tmp_path / "out.pose.mp4")


@pytest.mark.parametrize("name", ["image", "track", "video"])
@pytest.mark.parametrize("path", ["nowhere.bin", ".", "x" * 300])
def test_an_input_that_is_no_file(
    values: dict[str, Any], tmp_path: Path, name: str, path: str
) -> None:
    with pytest.raises(MediaError) as caught:
        check_files(job_with(values, **{name: tmp_path / path}))
    assert (caught.value.field, caught.value.code) == (name, "MEDIA_NOT_FOUND")


@pytest.mark.parametrize("suffix", [".mp4", ".json", ".png", ".pose.mp4"])
def test_no_existing_output_is_replaced_unless_asked(
    values: dict[str, Any], tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"out{suffix}").write_bytes(b"old")
    asked = {"sheet": True, "pose_preview": True}
    with pytest.raises(MediaError, match="give --overwrite"):
        check_files(job_with(values, **asked))
    check_files(job_with(values, **asked, overwrite=True))


def test_an_input_is_never_an_output(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is also 'image'"):
        check_files(job_with(values, output=tmp_path / "ref.mp4", sheet=True, overwrite=True))
    (tmp_path / "link.mp4").symlink_to(tmp_path / "dance.npz")
    with pytest.raises(MediaError, match="is also 'track'"):
        check_files(job_with(values, output=tmp_path / "link.mp4", overwrite=True))


def test_an_output_that_cannot_be_written(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist or cannot be written"):
        check_files(job_with(values, output=tmp_path / "no" / "out.mp4"))
    with pytest.raises(MediaError, match="File name too long"):
        check_files(job_with(values, output=tmp_path / ("x" * 300 + ".mp4")))
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MediaError, match="is not a file"):
        check_files(job_with(values, output=tmp_path / "dangling.mp4", overwrite=True))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="is not a file"):
        check_files(job_with(values, output=tmp_path / "folder.mp4", overwrite=True))


def test_weights_that_are_not_there(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'models_dir'"):
        check_files(job_with(values, models_dir=tmp_path / "nowhere"))
    with pytest.raises(WeightsError) as caught:
        check_files(job_with(values, loras=[f"{tmp_path}/none.safetensors"]))
    assert caught.value.code == "LORA_NOT_FOUND"
