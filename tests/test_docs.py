"""What the documents say can be done: links, make targets, commands, the example in Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from xicon_infer.job_flags import jobs_of, parse, run_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"(?:xicon-infer run|python -m xicon_infer\.run) (.*)")


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, body)
        for page in PAGES
        for kind, body in FENCE.findall(page.read_text())
        if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """Returns page and words of every run command in a shell block, and of `make demo`."""
    texts = [*blocks("sh"), ("Makefile", (ROOT / "Makefile").read_text())]
    joined = [(name, text.replace("\\\n", " ")) for name, text in texts]
    return [(name, words) for name, text in joined for words in COMMAND.findall(text)]


def test_there_are_commands_to_check():
    assert {name for name, _ in commands()} >= {"README.md", "pose.md", "Makefile"}


@pytest.mark.parametrize(("page", "words"), commands())
def test_every_command_is_understood(page, words):
    options = parse(run_parser(), shlex.split(words.replace("$(OUT)", "outputs")))
    assert all(job.output.suffix == ".mp4" for job in jobs_of(options))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, body in blocks("sh"):
        for line in re.findall(r"^make ([a-z ]+)", body, re.MULTILINE):
            assert set(line.split("#")[0].split()) <= targets, name


def test_the_example_in_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (source,) = [body for name, body in blocks("python") if name == "README.md"]
    exec(compile(source, "README.md", "exec"), {})
    assert "(17, 224, 128, 3)" in capsys.readouterr().out


def test_the_first_screen_has_both_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
