"""The shape of the code: who imports whom, what loads when, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xicon_infer", "pipelines")
MAX_LINES = 400

# Lowest first. A module may import from lower levels and from its own package, never from a
# sibling of its level.
LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "xicon_infer.types",
        "xicon_infer.errors",
        "xicon_infer.formulas",
        "xicon_infer.ahead",
        "xicon_infer.sizes",
    ),
    ("xicon_infer.settings",),
    (
        "xicon_infer.ops",
        "xicon_infer.media",
        "xicon_infer.job",
        "xicon_infer.runtime",
        "xicon_infer.gpus",
    ),
    ("xicon_infer.workflow",),
    ("xicon_infer.request",),
    ("xicon_infer.response",),
    ("xicon_infer.models", "xicon_infer.pose", "xicon_infer.sampling", "xicon_infer.weights"),
    ("pipelines",),
    ("xicon_infer.service",),
    ("xicon_infer.checks",),
    (
        "xicon_infer.console",
        "xicon_infer.doctor",
        "xicon_infer.weights_cli",
        "xicon_infer.workflow_cli",
        "xicon_infer.worker",
    ),
    ("xicon_infer.run",),
)
ANYWHERE = ("xicon_infer",)  # the package itself: version and public names

HEAVY_AT_TOP = ("diffusers", "transformers", "ultralytics", "onnxruntime", "runpod", "scipy")
TORCH_FREE = (
    "xicon_infer",
    "xicon_infer.run",
    "xicon_infer.job",
    "xicon_infer.runtime",
    "xicon_infer.gpus",
    "xicon_infer.media.deliver",
    "xicon_infer.media.fetch",
    "xicon_infer.media.image",
    "xicon_infer.media.video",
    "xicon_infer.media.write",
    "xicon_infer.media.sheet",
    "xicon_infer.sampling.schedule",
    "xicon_infer.sampling.windows",
    "xicon_infer.request",
    "xicon_infer.settings",
    "xicon_infer.weights.manifest",
    "xicon_infer.weights.warmup",
    "xicon_infer.workflow",
    "pipelines.memory",
    "pipelines.plan",
)


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> tuple[int, str] | None:
    """Returns the level of a module and the unit of that level it belongs to."""
    found = [
        (number, unit)
        for number, units in enumerate(LEVELS)
        for unit in units
        if module == unit or module.startswith((f"{unit}.", f"{unit}_"))
    ]
    # `weights_cli` is no part of `weights`.
    return max(found, key=lambda pair: len(pair[1]), default=None)


def imports(path: Path) -> set[str]:
    """Returns the modules of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
            }
            names |= submodules or {node.module}
    return {name for name in names if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_down(path):
    module = module_name(path)
    if module in ANYWHERE:
        return
    own = level(module)
    assert own is not None, f"{module} has no level: add it to LEVELS"
    for name in imports(path) - set(ANYWHERE):
        other = level(name)
        assert other is not None, f"{module} imports {name}, which has no level"
        assert other[0] < own[0] or other == own, f"{module} must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    for node in ast.parse(path.read_text()).body:
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not [n for n in names if n.split(".")[0] in HEAVY_AT_TOP]


def test_torch_free_modules_load_no_torch():
    code = (
        f"import importlib, sys\nfor name in {TORCH_FREE!r}: importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {{'torch', *{HEAVY_AT_TOP!r}}}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_recipes_load_no_model_library():
    code = (
        "import sys, pipelines.scail, xicon_infer.service\n"
        f"print(sorted(set(sys.modules) & set({HEAVY_AT_TOP!r})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_files_are_short():
    files = [
        p for folder in (*PACKAGES, "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    too_long = {
        str(p.relative_to(ROOT)): n
        for p in files
        if (n := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not too_long


def test_only_run_and_doctor_print_or_exit():
    for path in sources():
        if path.name in ("run.py", "doctor.py", "console.py"):
            continue
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls, path


def test_the_environment_is_read_in_one_place():
    for path in sources():
        text = path.read_text()
        if path.name != "runtime.py":
            assert "os.environ" not in text, path
            assert "getenv" not in text, path


def test_public_names():
    import xicon_infer

    assert xicon_infer.__all__ == ["Clip", "Result", "Track", "XiconError", "__version__"]
    for name in xicon_infer.__all__:
        assert hasattr(xicon_infer, name)
