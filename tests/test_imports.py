"""What each start of the program may load: names of modules, not seconds, which differ by machine.

`tests/test_architecture.py` holds what each module may import; here whole commands run, so that an
import inside a function is seen too, and one that a library brings along.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

# Nothing of these has a part in a SCAIL job whose motion is given: pose networks, other formats of
# weights, the hub, storage and the worker.
NOT_FOR_A_JOB = {
    "boto3",
    "botocore",
    "diffusers",
    "gguf",
    "httpx",
    "huggingface_hub",
    "onnxruntime",
    "requests",
    "runpod",
    "scipy",
    "ultralytics",
    "yaml",
}
# Nor of these in a start that computes nothing.
NOT_FOR_HELP = NOT_FOR_A_JOB | {
    "PIL",
    "av",
    "cv2",
    "jsonschema",
    "numpy",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
}
FEW_MODULES = 250
"""Of `--help`, the standard library's included; Python 3.11 loads 142."""


def loaded_by(code: str) -> list[str]:
    """Returns the modules that a fresh interpreter has loaded after some code."""
    out = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('loaded:', *sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.rpartition("loaded: ")[2].split()


def top_level(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def command(*words: str) -> str:
    return f"from xicon_infer.run import main\nassert main({list(words)!r}) == 0"


def test_the_package_loads_little() -> None:
    modules = loaded_by("import xicon_infer")
    assert not top_level(modules) & NOT_FOR_HELP
    own = sorted(name for name in modules if name.startswith(("xicon_infer", "pipelines")))
    assert own == ["xicon_infer", "xicon_infer.errors", "xicon_infer.types"]


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("--version",)])
def test_help_loads_little(words: tuple[str, ...]) -> None:
    modules = loaded_by(command(*words))
    assert not top_level(modules) & NOT_FOR_HELP
    assert len(modules) < FEW_MODULES
    assert not [name for name in modules if name.startswith(("pipelines", "xicon_infer.weights"))]


def test_a_warm_up_of_weight_files_loads_little() -> None:
    """It starts before torch is imported, which is its point."""
    modules = loaded_by(
        "from pathlib import Path\n"
        "from xicon_infer.weights.warmup import warm_files\n"
        f"warmup = warm_files([Path({str(ROOT / 'pyproject.toml')!r})])\n"
        "assert warmup.wait(60) and warmup.bytes_read > 0"
    )
    assert not top_level(modules) & NOT_FOR_HELP


def test_the_loader_loads_torch_and_no_other_format() -> None:
    modules = top_level(loaded_by("import xicon_infer.weights.reader"))
    assert "torch" in modules
    assert not modules & (NOT_FOR_A_JOB | {"transformers", "tokenizers", "cv2", "av", "PIL"})


def test_a_job_loads_nothing_it_does_not_use(tmp_path: Path) -> None:
    """Beyond the two encoders: their library itself loads the hub, yaml and, if there, scipy."""
    modules = loaded_by(
        "import torch\ntorch.set_num_threads(1)\n"
        "from transformers import CLIPVisionModel, UMT5EncoderModel\n"
        "theirs = list(sys.modules)\n"
        + command(
            *("--preset", "tiny", "--image", str(EXAMPLES / "character.png")),
            *("--track", str(EXAMPLES / "dance_fullbody.npz")),
            *("--output", str(tmp_path / "out.mp4"), "--width", "128", "--height", "128"),
            *("--num-inference-steps", "1", "--max-frames", "5", "--quiet"),
        )
        + "\nfor name in theirs: sys.modules.pop(name, None)"
    )
    assert (tmp_path / "out.mp4").stat().st_size > 0
    assert {"xicon_infer", "av", "cv2"} <= top_level(modules)
    assert not top_level(modules) & NOT_FOR_A_JOB
    models = {name.split(".")[2] for name in modules if name.startswith("transformers.models.")}
    assert models <= {"auto", "clip", "umt5"}


def test_the_budget_notices_an_import() -> None:
    assert top_level(loaded_by("import scipy")) & NOT_FOR_A_JOB == {"scipy"}
