"""Executes the steps of a Dockerfile stage in a folder, with the Python that runs the tests.

COPY from the context and RUN are done as they stand in the file; absolute folders of the image
become folders below the root. Steps that need a network, root, or the image's own packages are
passed over and named.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.dockerfile import VARIABLE, Instruction, ignored

FOLDERS = ("app", "build", "cache", "fetched", "models", "source")
PASSED_OVER = ("apt-get", "--requirement", "pip list", "check_image.py")


@dataclass
class Ran:
    """What was done: the folder that is the root, RUN texts done and passed over, output."""

    root: Path
    done: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    output: str = ""
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"

    def at(self, path: str) -> Path:
        """Returns where a path of the image lies."""
        return self.root / (path if path.startswith("/") else f"{self.cwd}/{path}").lstrip("/")

    def mapped(self, text: str) -> str:
        """Returns a text whose absolute folders lie below the root."""
        names = "|".join(FOLDERS)
        return re.sub(rf"(?<![\w/.-])/({names})(?=/|\b)", rf"{self.root}/\1", text)


def execute(
    steps: Sequence[Instruction], root: Path, context: Path, given: Mapping[str, str] | None = None
) -> Ran:
    """Returns what became of the steps.

    Args:
        steps: of a stage and its bases.
        root: an empty folder.
        context: of the build.
        given: build arguments.

    Raises:
        AssertionError: a step failed, or copies what is not there.
    """
    ran = Ran(root)
    programs = _programs(root)
    for step in steps:
        if step.word == "ARG":
            name, _, value = step.text.partition("=")
            ran.env[name] = (given or {}).get(name, value.strip('"'))
        elif step.word == "ENV":
            for name, value in re.findall(r"(\w+)=(\S*)", step.text):
                ran.env[name] = ran.mapped(_expanded(value, ran.env))
        elif step.word == "WORKDIR":
            ran.cwd = step.text
            ran.at(step.text).mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY" and not step.flag("from"):
            copy(step, ran, context)
        elif step.word == "RUN":
            _run(step, ran, programs)
    return ran


def copy(step: Instruction, ran: Ran, context: Path) -> None:
    """Copies files of the context that .dockerignore lets through, as COPY does."""
    rules = (context / ".dockerignore").read_text()
    *sources, target = step.words
    for source in sources:
        found = sorted(context.glob(source.rstrip("/")))
        assert found, f"line {step.line}: COPY {source} is not there"
        for path in found:
            folder = ran.at(target)
            into = folder if path.is_dir() or not target.endswith("/") else folder / path.name
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            kept = [p for p in files if not ignored(p.relative_to(context).as_posix(), rules)]
            assert kept, f"line {step.line}: .dockerignore keeps {source} out"
            for file in kept:
                aim = into / file.relative_to(path) if path.is_dir() else into
                if target in (".", "./") or (path.is_file() and aim.is_dir()):
                    aim = ran.at(target) / path.name
                aim.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, aim)


def _run(step: Instruction, ran: Ran, programs: Path) -> None:
    if any(word in step.text for word in PASSED_OVER):
        ran.passed_over.append(step.text)
        return
    path = f"{programs}:{os.environ['PATH']}"
    env = {**os.environ, **ran.env, "PATH": path, "PIP_NO_INDEX": "1", "HOME": str(ran.root)}
    done = subprocess.run(
        ["sh", "-euc", ran.mapped(step.text)],
        cwd=ran.at(ran.cwd),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    ran.output += done.stdout
    assert done.returncode == 0, f"line {step.line}: {step.text}\n{done.stdout}"
    ran.done.append(step.text)


def _programs(root: Path) -> Path:
    """Returns a folder with a `python` and a `pip` that installs below the root."""
    folder = root / "programs"
    folder.mkdir()
    site = root / "site"
    scripts = {
        "python": f'exec "{sys.executable}" "$@"',
        "pip": f'exec "{sys.executable}" -m pip "$@" --quiet --target "{site}"',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def _expanded(text: str, env: Mapping[str, str]) -> str:
    plain = VARIABLE.sub(lambda match: "\0" + match[1], text).replace("}", "")
    return re.sub(r"\0(\w+)", lambda match: env.get(match[1], ""), plain)
