"""What the tests of `xicon-infer weights` share: an empty machine, small files, and running it."""

from __future__ import annotations

import json

from xicon_infer.weights.manifest import load_manifest
from xicon_infer.weights_cli import main

VARIABLES = (
    "XICON_MODELS_DIR",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "COMFYUI_PATH",
    "COMFYUI_DIR",
    "COMFYUI_HOME",
)


def isolate(monkeypatch, tmp_path):
    """Nothing of this machine is found: no home, no variables, an empty working folder."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def by_id(name):
    return next(e for e in load_manifest().files if e.id == name)


def put(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def run(capsys, *words, workers=None):
    code = main([str(word) for word in words], workers=workers)
    return code, capsys.readouterr().out


def run_json(capsys, *words, workers=None):
    code, out = run(capsys, *words, "--json", workers=workers)
    return code, json.loads(out)
