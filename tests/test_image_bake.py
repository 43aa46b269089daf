"""The helpers of the build: fetching weights, checking the image, locking its packages."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.check_probes import CONTENT

ROOT = Path(__file__).parents[1]
BODY = CONTENT[".safetensors"]
SHA256 = hashlib.sha256(BODY).hexdigest()


def load(name: str):
    """Returns a script of docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name: str, component: str, **changes: object) -> dict[str, object]:
    plain = {
        "id": name,
        "component": component,
        "used_by": ["scail/fp8"],
        "repo": "someone/models",
        "path": f"{component}/{name}.safetensors",
        "revision": None,
        "bytes": len(BODY),
        "sha256": SHA256,
        "pin_source": "this test",
        "licence": "Apache-2.0",
        "licence_source": "this test",
        "names": [f"{name}.safetensors"],
        "comfyui": [f"{component}/{name}.safetensors"],
    }
    return plain | changes


@pytest.fixture
def bake(tmp_path):
    """Returns a function that bakes files which a build before has fetched already."""

    def run(*words: str, files: list[dict[str, object]], **env: str):
        manifest = tmp_path / "manifest.json"
        presets = {"scail": ["fp8", "tiny"]}
        manifest.write_text(json.dumps({"format": 1, "presets": presets, "files": files}))
        for file in files:
            path = tmp_path / "fetched" / str(file["comfyui"][0])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(BODY)
        folders = ["--store", tmp_path / "fetched", "--models", tmp_path / "models"]
        return subprocess.run(
            [sys.executable, ROOT / "docker/bake.py", "--manifest", manifest, *folders, *words],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


FILES = [entry("a", "vae"), entry("b", "text_encoder"), entry("c", "vae", used_by=["scail/fp8"])]


def baked(folder: Path) -> set[str]:
    models = folder / "models"
    return {p.relative_to(models).as_posix() for p in models.rglob("*") if p.is_file()}


@pytest.mark.parametrize("word", ["false", "0", "", "No"])
def test_nothing_is_fetched_unless_it_is_asked_for(bake, tmp_path, word):
    done = bake("--if", word, "scail/fp8", files=FILES)
    assert done.returncode == 0, done.stderr
    assert baked(tmp_path) == set()
    assert {p.name for p in (tmp_path / "models").iterdir()} == {
        "text_encoders",
        "clip_vision",
        "vae",
    }


def test_the_files_of_a_component_are_copied(bake, tmp_path):
    done = bake("--if", "false", "--if", "true", "scail/fp8:vae", files=FILES)
    assert done.returncode == 0, done.stderr
    assert baked(tmp_path) == {"vae/a.safetensors", "vae/c.safetensors"}
    path = tmp_path / "models" / "vae" / "a.safetensors"
    assert path.read_bytes() == BODY
    assert path.stat().st_mode & 0o777 == 0o644
    # The same files give the same layer, whenever they were fetched.
    assert path.stat().st_mtime == path.parent.stat().st_mtime == load("bake").MOMENT


def test_all_files_of_a_set(bake, tmp_path):
    assert bake("--if", "yes", "scail/fp8", files=FILES).returncode == 0
    assert len(baked(tmp_path)) == 3


def test_both_conditions_must_hold(bake, tmp_path):
    assert bake("--if", "true", "--and", "false", "scail/fp8", files=FILES).returncode == 0
    assert baked(tmp_path) == set()


def test_a_wrong_hash_fails_the_build(bake, tmp_path):
    wrong = [entry("a", "vae", sha256="0" * 64)]
    done = bake("--if", "true", "scail/fp8", files=wrong)
    assert done.returncode != 0
    assert SHA256 in done.stderr
    assert baked(tmp_path) == set()


def test_a_wrong_size_fails_the_build(bake, tmp_path):
    done = bake("--if", "true", "scail/fp8", files=[entry("a", "vae", bytes=len(BODY) + 1)])
    assert done.returncode != 0
    assert baked(tmp_path) == set()


def test_a_hash_that_nobody_pinned_fails_the_build(bake, tmp_path):
    files = [entry("a", "vae", sha256=None, bytes=None, pin_source="")]
    done = bake("--if", "true", "scail/fp8", files=files)
    assert done.returncode == 1
    assert "xicon-infer weights lock a" in done.stderr
    assert "ALLOW_UNPINNED_WEIGHTS=true" in done.stderr
    assert baked(tmp_path) == set()
    allowed = bake("--if", "true", "scail/fp8", files=files, ALLOW_UNPINNED_WEIGHTS="true")
    assert allowed.returncode == 0, allowed.stderr
    assert baked(tmp_path) == {"vae/a.safetensors"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--if", "maybe", "scail/fp8"), "must be true or false, got 'maybe'"),
        (("--if", "true", "scail/fp9"), "fp9"),
        (("--if", "true", "scial/fp8"), "scial"),
        (("--if", "true", "scail/fp8:lora"), "names no file"),
    ],
)
def test_mistakes_are_named(bake, words, said):
    done = bake(*words, files=FILES)
    assert done.returncode == 1
    assert said in done.stderr


def test_every_word_of_the_dockerfile_names_files():
    text = (ROOT / "Dockerfile").read_text()
    words = [w.strip('"') for w in text.split() if w.strip('"').count("/") == 1 and ":" in w]
    sets = [w for w in words if w.split("/")[0] in ("scail", "steady_dancer", "wan_i2v", "wan_t2v")]
    assert len(sets) == 10
    names = load("bake").entries_of(
        [w.replace("${STEADYDANCER_VARIANT}", "fp8") for w in sets] + ["pose/default"], None
    )
    folders = {name.target.split("/")[0] for name in names}
    assert {"diffusion_models", "text_encoders", "clip_vision", "vae", "loras"} <= folders
    for variant in ("fp8", "bf16", "gguf"):
        assert load("bake").entries_of([f"steady_dancer/{variant}:transformer"], None)


# ---- check_image and lock ------------------------------------------------------------------


def test_the_check_of_an_image_finds_other_versions():
    check = load("check_image")
    assert list(check.version_problems({"pytest": pytest.__version__})) == []
    (wrong,) = check.version_problems({"pytest": "0.1"})
    assert f"pytest is {pytest.__version__}, 0.1 is pinned" == wrong
    (absent,) = check.version_problems({"no-such-package-here": "1.0"})
    assert "is not installed" in absent


def test_the_check_of_an_image_finds_what_does_not_import():
    check = load("check_image")
    assert list(check.import_problems(("json", "av"))) == []
    (problem,) = check.import_problems(("no_such_module_here",))
    assert "no_such_module_here cannot be imported" in problem


def test_the_check_of_an_image_finds_another_cudnn():
    check = load("check_image")
    torch = pytest.importorskip("torch")
    found = torch.backends.cudnn.version()
    if found is None:
        pytest.skip("this PyTorch has no cuDNN")
    version = f"{found // 10_000}.{found // 100 % 100}.{found % 100}.1"
    assert list(check.cudnn_problems({"nvidia-cudnn-cu12": version})) == []
    (problem,) = check.cudnn_problems({"nvidia-cudnn-cu12": "9.1.0.1"})
    assert f"loads cuDNN {found}, 90100 is pinned" in problem


def test_the_check_of_an_image_reads_pins_and_codecs():
    check = load("check_image")
    text = "# a\n--extra-index-url x\ntorch==2.11.0+cu128\nnumpy==2.4.6 --hash=sha256:0\n"
    assert check.pins(text) == {"torch": "2.11.0+cu128", "numpy": "2.4.6"}
    assert list(check.codec_problems()) == []


def test_the_check_of_an_image_compiles(monkeypatch):
    check = load("check_image")
    monkeypatch.setattr(check, "SOURCE", "this is no C\n")
    (problem,) = check.compiler_problems()
    assert "gcc" in problem


def test_a_lock_is_made_of_a_report():
    lock = load("lock")
    sha = "ab" * 32
    item = {
        "metadata": {"name": "Ruamel_Yaml.x", "version": "1.0"},
        "download_info": {"archive_info": {"hashes": {"sha256": sha}}},
    }
    text = lock.lock_text({"install": [item]})
    assert text.endswith(f"\nruamel-yaml-x==1.0 --hash=sha256:{sha}\n")
    assert lock.shared_constraints("torch==1\nav==2; x\n") == "av==2; x\n"
    command = lock.pip_command(Path("c"), Path("r"), Path("f"))
    assert "--dry-run" in command
    assert "--python-version=3.12" in command
