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


def test_names_of_the_outputs_of_found_poses(tmp_path: Path) -> None:
    dance = {"video": tmp_path / "dance.mp4", "output": tmp_path / "out.mp4"}
    found = make_job({**dance, "image": "a.png", "save_track": True, "overlay": True}).outputs()
    assert found["track"] == tmp_path / "out.npz"
    assert found["overlay"] == tmp_path / "out.overlay.mp4"
    assert set(found) == {"video", "report", "track", "overlay"}
    alone = make_job({**dance, "pipeline": "pose", "sheet": True}).outputs()
    assert set(alone) == {"video", "report", "track", "openpose", "sheet"}
    assert alone["openpose"] == tmp_path / "out.openpose.json"
    given = make_job({"track": "t.npz", "pipeline": "pose"}).outputs()
    assert set(given) == {"video", "report", "track", "openpose"}


def test_redrawing_a_track_over_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_bytes(b"x")
    values = {"pipeline": "pose", "track": tmp_path / "out.npz", "output": tmp_path / "out.mp4"}
    with pytest.raises(MediaError, match="is also 'track'"):
        check_files(make_job({**values, "overwrite": True}))


def test_a_detector_that_is_not_there(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'detector'") as caught:
        check_files(job_with(values, detector=str(tmp_path / "mine.pt")))
    assert caught.value.field == "detector"
    (tmp_path / "mine.pt").write_bytes(b"x")
    check_files(job_with(values, detector=str(tmp_path / "mine.pt")))


@pytest.mark.parametrize("name", ["image", "track", "video"])
@pytest.mark.parametrize("path", ["nowhere.bin", ".", "x" * 300])
def test_an_input_that_is_no_file(
    values: dict[str, Any], tmp_path: Path, name: str, path: str
) -> None:
    with pytest.raises(MediaError) as caught:
        check_files(job_with(values, **{name: tmp_path / path}))
    assert (caught.value.field, caught.value.code) == (name, "MEDIA_NOT_FOUND")


@pytest.mark.parametrize("suffix", [".mp4", ".json", ".npz", ".openpose.json", ".overlay.mp4"])
def test_no_existing_output_of_pipeline_pose_is_replaced(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "dance.mp4").write_bytes(b"x")
    (tmp_path / f"out{suffix}").write_bytes(b"old")
    values = {"video": tmp_path / "dance.mp4", "output": tmp_path / "out.mp4"}
    job = make_job({**values, "pipeline": "pose", "overlay": True})
    with pytest.raises(MediaError, match="give --overwrite"):
        check_files(job)


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
