"""The Dockerfile: the rules it keeps, its order, its pins, and its steps without a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfile import chain, ignored, instructions, problems, stages
from tests.dockerfile_run import execute

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
RULES = (ROOT / ".dockerignore").read_text()
VARIANTS = ("default", "xformers", "cuda13")
GOOD = """FROM python:3.12.12-slim AS base
ARG A=1
RUN echo ${A}
USER 10001
ENTRYPOINT ["tini", "--"]
CMD ["python"]
"""


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text()
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)([^\n]*)", text, re.MULTILINE)
    return {
        re.sub(r"[-_.]+", "-", package).lower(): version
        for package, version, rest in found
        if '< "3.11"' not in rest
    }


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


# ---- the rules -----------------------------------------------------------------------------


def test_no_rule_is_broken():
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("python:3.12.12-slim", "python:latest", "no exact version"),
        ("python:3.12.12-slim", "python", "no exact version"),
        ("RUN echo", "ADD https://example.com/a /\nRUN echo", "use COPY"),
        ("RUN echo", "RUN pip install numpy;", "keeps its cache"),
        ("RUN echo", "RUN pip install --no-cache-dir numpy;", "whatever versions"),
        ("RUN echo", "RUN apt-get update && apt-get install gcc;", "--no-install-recommends"),
        (
            "RUN echo",
            "RUN apt-get install --no-install-recommends gcc;",
            "fetched and removed",
        ),
        ("RUN echo", "RUN curl -O x;", "fetches by hand"),
        ("RUN echo", "RUN chmod 777 /app;", "lets everybody write"),
        ("USER 10001", "USER root", "is root"),
        ("USER 10001\n", "", "is root"),
        ('CMD ["python"]', 'CMD ["python"]\nRUN true', "after USER"),
        ('CMD ["python"]', "CMD python", "JSON list"),
        ('CMD ["python"]\n', "", "one CMD"),
        ("ARG A=1", "ARG A=1\nARG B=1", "ARG B is not used"),
        ("ARG A=1", "ARG A=1\nARG HF_TOKEN\nRUN echo ${HF_TOKEN}", "looks like a secret"),
        ("ARG A=1", "ARG A=1\nENV BUCKET_SECRET_ACCESS_KEY=x", "looks like a secret"),
        ("ARG A=1", "ARG A=1\nENV A=hf_abcdefghijklmnopqrstuvwx", "looks like a secret"),
        ("ARG A=1", "ARG A=1\nHEALTHCHECK CMD true", "serverless"),
        ("ARG A=1", "ARG A=1\nWORKDIR app", "absolute"),
        ("ARG A=1", "ARG A=1\nCOPY a b /app", "slash"),
    ],
)
def test_each_rule_finds_its_breach(old, new, said):
    assert problems(GOOD) == []
    assert old in GOOD
    assert any(said in problem for problem in problems(GOOD.replace(old, new)))


def test_continued_lines_comments_and_flags_are_read():
    first, second = instructions("# x\nRUN --mount=type=cache,target=/a \\\n  # y\n  b\nCMD []\n")
    assert (first.word, first.text, first.line) == ("RUN", "b", 2)
    assert first.flag("mount") == "type=cache,target=/a"
    assert second.words == []


# ---- order and content ---------------------------------------------------------------------


def test_layers_go_from_what_never_changes_to_what_always_does():
    order = [
        ("RUN", "apt-get install"),
        ("RUN", "/build/torch-"),
        ("RUN", "--require-hashes"),
        ("RUN", "${ATTENTION_WHEELS}"),
        ("COPY", "/models/"),
        ("COPY", "xicon_infer/"),
        ("RUN", "--no-build-isolation"),
        ("COPY", "handler.py"),
        ("ENV", "PYTHONUNBUFFERED=1"),
        ("USER", "10001:10001"),
        ("ENTRYPOINT", "tini"),
    ]
    steps = chain(TEXT)
    places = [
        next(i for i, step in enumerate(steps) if step.word == word and text in step.text)
        for word, text in order
    ]
    assert places == sorted(places)
    baked = [i for i, step in enumerate(steps) if step.flag("from").startswith("weights-")]
    assert max(baked) < places[5]  # all weights before any code


def test_every_set_of_weights_is_copied_in_a_layer_of_its_own():
    fetched = {stage.name for stage in stages(TEXT) if stage.name.startswith("weights-")}
    copied = [step.flag("from") for step in chain(TEXT) if step.flag("from")]
    assert set(copied) == fetched
    assert all("--link" in step.flags for step in chain(TEXT) if step.flag("from"))


def test_build_arguments_and_their_defaults():
    given = dict(
        step.text.replace('"', "").split("=", 1)
        for step in instructions(TEXT)
        if step.word == "ARG"
    )
    bake = {f"BAKE_{name}": "false" for name in ("SCAIL", "STEADYDANCER", "WAN_I2V", "WAN_T2V")}
    assert given == {
        **bake,
        "BAKE_LORA": "false",
        "BAKE_POSE": "false",
        "POSE_PRESET": "default",
        "STEADYDANCER_VARIANT": "fp8",
        "TORCH_VARIANT": "default",
        "ATTENTION_WHEELS": "",
        "ALLOW_UNPINNED_WEIGHTS": "false",
    }


def test_the_token_comes_as_a_secret_and_only_where_weights_are_fetched():
    for stage in stages(TEXT):
        for step in stage.of("RUN"):
            secret = any("type=secret" in flag for flag in step.flags)
            assert secret == ("docker/bake.py" in step.text)


def test_the_environment_at_run_time():
    (env,) = [step.text for step in chain(TEXT) if step.word == "ENV"]
    for setting in (
        "PYTHONUNBUFFERED=1",
        "RUNPOD_LOG_LEVEL=INFO",
        "HF_HUB_OFFLINE=1",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        "XICON_CACHE_DIR=/cache/",
        "TRITON_CACHE_DIR=/cache/",
    ):
        assert setting in env
    fetching = [step.text for step in chain(TEXT, "weights-scail") if step.word == "ENV"]
    assert not any("HF_HUB_OFFLINE" in text for text in fetching)


def test_how_the_worker_starts():
    steps = chain(TEXT)
    (entry,) = [step.words for step in steps if step.word == "ENTRYPOINT"]
    (command,) = [step.words for step in steps if step.word == "CMD"]
    assert entry == ["/usr/bin/tini", "--"]
    assert command == ["python", "-u", "handler.py"]


def test_packages_of_the_system():
    (step,) = [step.text for step in chain(TEXT) if "apt-get install" in step.text]
    words = set(step.split())
    assert {"ca-certificates", "gcc", "libc6-dev", "libgl1", "libglib2.0-0", "tini"} <= words
    assert not words & {"git", "wget", "curl", "openssh-server", "jupyter", "build-essential"}


# ---- pins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_pytorch_decodes_video_fast(variant):
    torch = pins(f"docker/torch-{variant}.txt")
    ((name, cudnn),) = pins(f"docker/cudnn-{variant}.txt").items()
    assert re.fullmatch(r"nvidia-cudnn-cu1[23]", name)
    assert numbers(cudnn) >= ((9, 19) if variant != "xformers" else (9, 15))
    assert {"torch", "torchvision", "onnxruntime-gpu"} <= set(torch)
    assert numbers(torch["torch"]) >= (2, 10)


def test_the_variants_are_the_ones_that_fit_together():
    default, other, newest = (pins(f"docker/torch-{variant}.txt") for variant in VARIANTS)
    assert numbers(default["torch"]) >= (2, 11)
    assert default["torch"].endswith("+cu128")
    assert (other["torch"], other["xformers"]) == ("2.10.0", "0.0.35")
    tested = pins("constraints.txt")
    for name in ("torch", "torchvision", "onnxruntime-gpu"):
        assert newest[name] == tested[name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_pytorch_brings_along_is_what_the_lock_has(variant):
    lock, tested = pins("docker/packages.txt"), pins("constraints.txt")
    own = ("torch", "torchvision", "onnxruntime-gpu", "xformers", "setuptools")
    for name, version in pins(f"docker/torch-{variant}.txt").items():
        if name not in own:
            assert version == {**tested, **lock}[name], name


def test_the_lock_has_the_tested_versions_with_hashes():
    lines = (ROOT / "docker/packages.txt").read_text().splitlines()
    locked = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in locked)
    lock, tested = pins("docker/packages.txt"), pins("constraints.txt")
    assert {name: lock[name] for name in lock if name in tested} == {
        name: tested[name] for name in lock if name in tested
    }


def test_the_lock_holds_everything_that_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    needed = set(re.findall(r'^ +"([\w.-]+)', block, re.MULTILINE))
    assert {"torch", "av", "numpy"} <= needed
    have = pins("docker/packages.txt") | pins("docker/torch-default.txt")
    assert needed <= set(have)
    assert {"runpod", "boto3", "hatchling"} <= set(have)
    wanted = (ROOT / "docker/packages.in").read_text().splitlines()
    assert {line for line in wanted if not line.startswith("#")} <= set(have)


# ---- the context, and the steps ------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        "docs/notes.md",
        "models/a.safetensors",
        "outputs/a.mp4",
        "secrets.json",
        "tests/test_run.py",
        "xicon_infer/__pycache__/run.cpython-312.pyc",
    ],
)
def test_what_stays_out_of_the_image(path):
    assert ignored(path, RULES)


def test_the_last_rule_that_fits_decides():
    assert ignored("a/b.txt", "*\n!c\n")
    assert not ignored("a/b.txt", "*\n!a\n")
    assert ignored("a/b.txt", "*\n!a\n**/*.txt\n")


def test_steps_without_a_network_run_in_a_clean_folder(tmp_path):
    for stage in stages(TEXT):
        if stage.base == "fetch":
            root = tmp_path / stage.name
            root.mkdir()
            ran = execute(chain(TEXT, stage.name), root, ROOT)
            assert any("docker/bake.py" in text for text in ran.done)
            # Nothing was asked for, so nothing was fetched; the folders to copy are there.
            for name in ("text_encoders", "clip_vision", "vae"):
                assert list((root / "models" / name).iterdir()) == []


def test_the_installed_package_works_in_a_clean_folder(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the package, is not installed")
    ran = execute(chain(TEXT), tmp_path, ROOT)
    assert [text for text in ran.done if "--no-build-isolation" in text]
    assert (tmp_path / "app" / "handler.py").is_file()
    site = tmp_path / "site"
    assert (site / "xicon_infer" / "weights_manifest.json").is_file()
    env = {**os.environ, "PYTHONPATH": str(site), "XICON_MODELS_DIR": str(tmp_path / "models")}
    doctor = subprocess.run(
        [sys.executable, str(site / "bin" / "xicon-infer"), "doctor"],
        cwd=tmp_path / "app",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "The tiny preset can run here." in doctor.stdout
    where = [sys.executable, "-c", "import xicon_infer; print(xicon_infer.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))
