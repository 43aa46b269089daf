"""Every example of docs/python.md runs, in order, in one namespace, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xicon_infer.media.video import probe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()
EXAMPLES = dict(
    re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
    )
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Returns heading -> what its example printed, and the folder it ran in under ""."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    namespace: dict[str, object] = {}
    found: dict[str, str] = {"": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("XICON_MODELS_DIR", "MODELS_DIR", "COMFYUI_PATH"):
            patch.delenv(name, raising=False)
        for heading, source in EXAMPLES.items():
            lines: list[str] = []
            namespace["print"] = lambda *words, into=lines: into.append(" ".join(map(str, words)))
            exec(compile(source, f"docs/python.md, {heading}", "exec"), namespace)
            found[heading] = "\n".join(lines)
    return found


def test_every_block_is_an_example():
    assert len(EXAMPLES) == len(re.findall(r"^```python$", PAGE, re.MULTILINE)) == 10


def test_scail_makes_a_file(printed):
    assert printed["SCAIL"] == "(5, 96, 64, 3) 24 (5, 48, 32, 3)"
    info = probe(Path(printed[""]) / "scail.mp4")
    assert (info.width, info.height) == (64, 96)


def test_steady_dancer_draws_the_varied_pose(printed):
    assert printed["SteadyDancer"] == "(5, 96, 64, 3) True"


def test_wan_runs_from_text_and_from_a_picture(printed):
    assert printed["Wan2.1"] == "(5, 64, 96, 3)\n(5, 64, 96, 3)"


def test_the_second_character_shares_text_and_pose(printed):
    assert printed["Several characters, one dance"] == "taken from the cache: 2"


def test_the_stages_give_what_the_pipeline_gives(printed):
    assert printed["Stage by stage"] == "torch.Size([1, 16, 2, 12, 8]) True"


def test_a_job_can_be_stopped(printed):
    warned, stopped = printed["Progress, and stopping"].splitlines()
    assert warned == "warning: the pose has 212 frames, 5 are asked for: cut"
    assert stopped == "two steps are enough"


def test_an_error_names_field_and_value(printed):
    assert re.match(r"[A-Z_]+ width 'width' must be .* got 100", printed["Errors"])


def test_jobs_write_videos_and_reports(printed):
    lines = printed["From files to files"].splitlines()
    assert lines == [f"dance_{seed}.mp4 {seed} dance_{seed}.json" for seed in (1, 2)]
    assert all((Path(printed[""]) / line.split()[0]).stat().st_size for line in lines)


def test_a_plan_names_the_card(printed):
    assert printed["What a job costs"].startswith("48832 tokens, 6 forward passes\n")
    assert "RTX 4090" in printed["What a job costs"]


def test_missing_weights_are_named_with_the_command(printed):
    assert "xicon-infer weights pull" in printed["Real weights"]
