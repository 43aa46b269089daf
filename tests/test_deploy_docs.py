"""The pages about deploying and about trouble: what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.dockerfile import instructions
from xicon_infer.doctor import _parser
from xicon_infer.response_codes import CODES, WARNINGS
from xicon_infer.settings_old import OLD_NAMES
from xicon_infer.settings_table import SETTINGS

ROOT = Path(__file__).parents[1]
DEPLOY = (ROOT / "docs/deploy-runpod.md").read_text()
TROUBLE = (ROOT / "docs/troubleshooting.md").read_text()
ARGS = {
    step.text.partition("=")[0]: step.text.partition("=")[2].strip('"')
    for step in instructions((ROOT / "Dockerfile").read_text())
    if step.word == "ARG"
}
THREADS = {
    "Comfy-Org/comfy-cli": ["155"],
    "MCG-NJU/SteadyDancer": ["34"],
    "ai-dock/comfyui": ["72"],
    "amd/gaia": ["3029"],
    "davefojtik/RunPod-Fooocus-API": ["27"],
    "kijai/ComfyUI-WanVideoWrapper": ["785", "983", "1272", "1759"],
    "microsoft/onnxruntime": ["26245", "26181"],
    "runpod-workers/worker-comfyui": ["36", "49", "90", "125", "129", "131", "186", "191", "221"],
    "runpod-workers/worker-vllm": ["29", "111"],
    "runpod/runpod-python": ["250", "275", "299", "309", "510"],
    "wlsdml1114/Infinitetalk_Runpod_hub": ["17"],
    "wlsdml1114/Wan_Animate_Runpod_hub": ["2", "7"],
    "wlsdml1114/generate_video": ["1", "15"],
    "zai-org/SCAIL": ["32"],
}


@pytest.mark.parametrize("repo", THREADS)
def test_every_thread_is_answered(repo):
    around = " ".join(re.findall(rf"{re.escape(repo)}[^)]*", TROUBLE))
    for number in THREADS[repo]:
        assert re.search(rf"\b{number}\b", around), f"{repo} {number}"


def test_every_code_exists():
    named = set(re.findall(r"\[([A-Z][A-Z_]+)\]", TROUBLE + DEPLOY))
    named |= set(re.findall(r"`([A-Z]+_[A-Z_0-9]+)`", TROUBLE))
    names = {setting.name for setting in SETTINGS} | {"RUNPOD_MIN_DISK_PERCENT"}
    unknown = named - set(CODES) - set(WARNINGS) - names
    assert not unknown
    assert len(named & set(CODES)) >= 15


@pytest.mark.parametrize("text", [DEPLOY, TROUBLE], ids=["deploy", "trouble"])
def test_every_variable_exists(text):
    known = {name for setting in SETTINGS for name in (setting.name, *setting.also)}
    known |= {"XICON_MODSE"}  # the typing error
    for name in re.findall(r"\b(?:XICON|BUCKET)_[A-Z0-9_]+[A-Z0-9]\b", text):
        assert name in known, name
        assert not any(old.matches(name) for old in OLD_NAMES)


def test_the_table_of_build_arguments_is_that_of_the_dockerfile():
    table = DEPLOY.partition("| build argument |")[2].partition("\n\n")[0]
    listed = {}
    for names, defaults in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table, re.MULTILINE):
        every, values = re.findall(r"`(\w+)`", names), re.findall(r"`([^`]*)`", defaults)
        values = values or [""]
        listed |= dict(zip(every, values if len(values) > 1 else values * len(every), strict=True))
    assert listed == ARGS


def test_build_arguments_in_commands_exist():
    for name, value in re.findall(r"--build-arg (\w+)=(\w+)", DEPLOY + TROUBLE):
        assert name in ARGS
        if name == "TORCH_VARIANT":
            assert (ROOT / f"docker/torch-{value}.txt").is_file()


@pytest.mark.parametrize("variant", ["default", "xformers", "cuda13"])
def test_the_table_of_variants_has_the_pinned_versions(variant):
    row = next(line for line in DEPLOY.splitlines() if line.startswith(f"| `{variant}` |"))
    torch = (ROOT / f"docker/torch-{variant}.txt").read_text()
    cudnn = (ROOT / f"docker/cudnn-{variant}.txt").read_text()
    assert re.search(r"^torch==([\d.]+)", torch, re.MULTILINE)[1].rstrip(".") in row
    assert re.search(r"cudnn-cu1\d==(\d+\.\d+)", cudnn)[1] in row


def test_options_of_doctor_exist():
    options = set(_parser()._option_string_actions)
    for words in re.findall(r"doctor((?: --[a-z-]+)+)", DEPLOY + TROUBLE):
        assert set(words.split()) <= options


def test_the_texts_of_the_start_are_those_of_the_checks():
    source = "".join(
        path.read_text()
        for path in (
            *sorted((ROOT / "xicon_infer").glob("checks_*.py")),
            ROOT / "xicon_infer/ops/cudnn.py",
        )
    )
    for phrase in (
        "no answer within",
        "is too old for a PyTorch built for CUDA",
        "sees no GPU",
        "cannot multiply on a",
        "something else uses this GPU",
        "decodes video 10 to 20 times slower",
        "cannot be written to",
        "a job needs",
        "missing: ",
    ):
        assert phrase in source
        assert phrase in TROUBLE


def test_what_was_not_tried_is_said():
    assert "**Unverified here**" in DEPLOY
    assert not re.search(r"[$€]\s?\d", DEPLOY)  # no invented prices
