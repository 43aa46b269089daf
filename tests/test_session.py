"""What a session keeps between jobs, and when it loads again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.every_preset import write_preset
from tests.tiny_models import LORA_NAME
from xicon_infer.errors import WeightsError
from xicon_infer.job import make_job
from xicon_infer.media.video import read_clip
from xicon_infer.service import run_job
from xicon_infer.service_session import Session
from xicon_infer.types import SilentProgress

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_preset(tmp_path_factory.mktemp("weights"), "scail", "fp8")


class Jobs:
    """Runs jobs in one session and says which of them loaded the model."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights
        self.session, self.count = Session(), 0

    def run(self, **values) -> tuple[bool, np.ndarray]:
        self.count += 1
        given = {
            "preset": "fp8",
            "models_dir": str(self.weights),
            "image": str(EXAMPLES / "character.png"),
            "track": str(EXAMPLES / "dance_fullbody.npz"),
            "output": str(self.folder / f"{self.count}.mp4"),
            "width": 128,
            "height": 128,
            "num_inference_steps": 1,
            "max_frames": 1,
            "seed": 7,
            "loras": ["none"],
        }
        result = run_job(make_job(given | values), SilentProgress(), self.session)
        loaded = "load models" in [stage.name for stage in result.stages]
        self.result = result
        return loaded, read_clip(result.path).frames


@pytest.fixture
def jobs(tmp_path, weights) -> Jobs:
    return Jobs(tmp_path, weights)


def test_other_loras_need_no_loading(jobs):
    loaded, plain = jobs.run()
    assert loaded
    swapped, with_lora = jobs.run(loras=[LORA_NAME])
    assert not swapped
    assert not np.array_equal(plain, with_lora)
    assert jobs.result.machine["storage"]["loras"] == [[LORA_NAME, 1.0]]
    again, half = jobs.run(loras=[f"{LORA_NAME}:0.5"])
    assert not again
    assert not np.array_equal(half, with_lora)
    back, restored = jobs.run()
    assert not back
    np.testing.assert_array_equal(restored, plain)


def test_a_merged_lora_is_taken_off_by_loading_again(jobs):
    merged = {"loras": [LORA_NAME], "lora_mode": "merge"}
    assert jobs.run(**merged)[0]
    assert not jobs.run(**merged)[0]
    loaded, plain = jobs.run()
    assert loaded
    np.testing.assert_array_equal(plain, Jobs(jobs.folder / "..", jobs.weights).run()[1])


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bf16"}, {"storage": "merged-bf16"}, {"preset": "tiny", "models_dir": None}],
)
def test_what_loads_again(jobs, change):
    jobs.run()
    loaded, _ = jobs.run(**change)
    assert loaded


@pytest.mark.parametrize("change", [{"seed": 8}, {"width": 160}, {"attention": "math"}])
def test_what_does_not(jobs, change):
    jobs.run()
    loaded, _ = jobs.run(**change)
    assert not loaded


def test_a_lora_that_is_not_there_leaves_the_session_usable(jobs):
    _, plain = jobs.run()
    with pytest.raises(WeightsError, match="was not found"):
        jobs.run(loras=["nope.safetensors"])
    loaded, again = jobs.run()
    assert not loaded
    np.testing.assert_array_equal(again, plain)


def test_the_report_says_how_weights_lie(jobs):
    jobs.run(storage="merged-fp8", dtype="bf16")
    machine = jobs.result.machine
    assert machine["storage"]["storage"] == "merged-fp8"
    assert machine["storage"]["guarded"], "the first and the last block stay wide, here all"
    jobs.run(matmul="scaled_mm_row", dtype="bf16")
    machine = jobs.result.machine
    assert machine["storage"]["matmul"] == "scaled_mm_row"
    assert machine["memory"] == {"mode": "resident"}


def test_memory_is_not_planned_on_the_cpu(jobs):
    jobs.run(memory="stream")
    assert any("no effect on the CPU" in warning for warning in jobs.result.warnings)


def test_a_search_of_cudnn_is_said_to_be_idle_on_the_cpu(jobs):
    told = "'cudnn_benchmark' has no effect on the CPU"
    jobs.run()
    assert told not in jobs.result.warnings
    jobs.run(cudnn_benchmark=True)
    assert told in jobs.result.warnings
