"""The memory plan of a job on a named card: from the options, as text, as the table in the docs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipelines.memory import Allowed
from pipelines.memory_needs import needs_of
from pipelines.plan_memory import (
    LORA_RANK,
    TABLE_JOBS,
    low_memory_table,
    memory_for,
    memory_lines,
    workload_of,
)
from xicon_infer import formulas, formulas_vae
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import VaeShape
from xicon_infer.job import make_job

ROOT = Path(__file__).parents[2]
SCAIL = TABLE_JOBS["SCAIL 512x896"]


@dataclass(frozen=True)
class Sizes:
    dit: DitShape = formulas.SCAIL_14B
    vae: VaeShape = formulas_vae.WAN_VAE
    width: int = 512
    height: int = 896
    num_frames: int = 81
    matrix_bytes: int = 1
    element_bytes: int = 2


def work(sizes=None, *, pipeline="scail", window=None, batch=1, **options):
    given = {"pipeline": "scail", "image": "a.png", "track": "a.npz", "output": "a.mp4"}
    job = make_job({**given, "preset": "fp8", **options})
    return workload_of(job, sizes or Sizes(), pipeline, window=window, batch=batch)


def test_a_default_job_is_that_of_the_table():
    found = work()
    count = found.lora_rank // LORA_RANK
    assert replace(found, lora_rank=64) == SCAIL
    assert count == len(make_job({"pipeline": "scail", "image": "a", "track": "b"}).loras)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"guidance_scale": 4.0}, "contexts", 2),
        ({"batch": 2}, "batch", 2),
        ({"window": 49}, "window", 49),
        ({"loras": ()}, "lora_rank", 0),
        ({"lora_mode": "merge"}, "lora_rank", 0),
        ({"tile": True, "tile_width": 320}, "tile", (320, 272)),
        ({"tile": True, "tile_stride_height": 160}, "stride", (128, 160)),
        ({"preset": "tiny"}, "text_parameters", 0),
        ({"preset": "tiny"}, "image_parameters", 0),
        ({"pipeline": "steady_dancer"}, "extra_parameters", 1_839_952),
        ({"sizes": Sizes(matrix_bytes=2)}, "fp8_file", False),
        ({"sizes": Sizes(element_bytes=4)}, "element_bytes", 4),
        ({"sizes": Sizes(width=640)}, "width", 640),
        ({"sizes": Sizes(height=640)}, "height", 640),
        ({"sizes": Sizes(num_frames=33)}, "num_frames", 33),
        ({"sizes": Sizes(dit=formulas.WAN_T2V_14B)}, "image_parameters", 0),
    ],
)
def test_every_option_reaches_the_workload(change, field, value):
    change = dict(change)
    if "pipeline" in change:  # of the tokens; the job itself stays one of SCAIL
        found = work(pipeline=change["pipeline"])
    else:
        found = work(change.pop("sizes", None), **change)
    assert getattr(found, field) == value
    assert found != work()
    assert needs_of(found, "reference").work is found


def test_a_card_that_the_context_fills_is_refused():
    with pytest.raises(OutOfMemory, match="larger card"):
        memory_for(SCAIL, "1GB")


def test_the_table_in_the_docs_is_the_table():
    page = (ROOT / "docs" / "low-memory.md").read_text()
    assert low_memory_table() in page
    assert "predicted, unverified on a GPU" in page


def test_lines_for_the_terminal():
    plan = memory_for(SCAIL, "nvidia rtx-4090")
    first, *rest = memory_lines(plan, "4090")
    assert first.startswith("RTX 4090: offload, storage reference, at most")
    assert "predicted" in first
    assert any("wait" in line for line in rest)
    swapped = "\n".join(memory_lines(memory_for(SCAIL, "12GB"), "12GB"))
    assert "of 40 blocks are swapped" in swapped
    assert "text encoder" in swapped
    old = replace(SCAIL, width=416, height=672)
    assert any("--dtype fp16" in line for line in memory_lines(memory_for(old, "T4"), "T4"))
    assert not any("fp16" in line for line in [first, *rest])


def test_requests_and_limits_reach_the_plan():
    assert memory_for(SCAIL, "H100", request="offload").mode == "offload"
    assert memory_for(SCAIL, "H100", allow=Allowed(blocks_to_swap=7)).blocks_to_swap == 7
    with pytest.raises(InvalidRequest, match="did you mean"):
        memory_for(SCAIL, "RTX 4091")
