"""What the documents say can be done: links, make targets, commands, the example in Python."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from xicon_infer import doctor, weights_cli, workflow_cli
from xicon_infer.errors import MediaError
from xicon_infer.job_flags import jobs_of, parse, run_parser
from xicon_infer.weights.manifest import load_manifest, select

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:xicon-infer|python -m xicon_infer\.run) (.+)")
BENCHMARK = re.compile(r"python (?:-m benchmarks\.|benchmarks/)(\w+)(?:\.py)? ?(.*)")
SHELL = ("sh", "console", "bash")
HOW_TO = {
    "README.md": ("scail", "steady_dancer", "wan_i2v", "wan_t2v", "pose"),
    "scail.md": ("scail",),
    "steady-dancer.md": ("steady_dancer",),
    "wan-video.md": ("wan_i2v", "wan_t2v"),
    "pose.md": ("pose",),
}


def joined(text: str) -> str:
    """Returns shell text with one command a line and without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(re.sub(r"(^|\s)#\s.*", "", line) for line in lines)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, body)
        for page in PAGES
        for kind, body in FENCE.findall(page.read_text())
        if kind == language
    ]


def shell_texts() -> list[tuple[str, str]]:
    """Returns page and text of every shell block, and of the Makefile."""
    found = [block for language in SHELL for block in blocks(language)]
    return [(name, joined(text)) for name, text in [*found, ("Makefile", makefile())]]


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def inline_commands() -> list[tuple[str, str]]:
    """Returns page and words of every command in running text that is whole."""
    return [
        (page.name, words)
        for page in PAGES
        for words in re.findall(r"`xicon-infer ([^`\n]+)`", FENCE.sub("", page.read_text()))
        if not re.search(r"FILE|SET\b|PATH|\.\.\.|…|\||\[", words)
    ]


def commands() -> list[tuple[str, str]]:
    """Returns page and words behind `xicon-infer` of every command."""
    found = [(name, words) for name, text in shell_texts() for words in COMMAND.findall(text)]
    return list(dict.fromkeys([*found, *inline_commands()]))


def of(*names: str) -> list[tuple[str, list[str]]]:
    """Returns page and words of the commands of these names; the module form has no name."""
    found = []
    for page, text in commands():
        words = shlex.split(text.replace("$(OUT)", "outputs"), comments=True)
        words = words[: words.index(">")] if ">" in words else words
        name = "run" if words[0].startswith("-") else words[0]
        if name in names:
            found.append((page, words[words[0] == name :]))
    return found


@pytest.fixture
def no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_are_commands_of_every_kind():
    assert {name for name, _ in of("run")} >= {"README.md", "pose.md", "Makefile"}
    assert {name for name, _ in of("weights")} >= {"README.md", "weights.md"}
    assert {name for name, _ in of("import-workflow")} >= {"migrate-from-comfyui.md"}
    assert of("doctor")


def test_every_command_has_a_known_name():
    known = len(of("run", "weights", "import-workflow", "doctor"))
    assert known == len(commands()), [c for c in commands() if c[1].split()[0] not in ("run",)]


@pytest.mark.parametrize(("page", "words"), of("run"))
def test_every_run_is_understood(page, words):
    options = parse(run_parser(), words)
    if not {"--help"} & set(words) and set(words) - {"--dry-run"}:
        assert all(job.output.suffix == ".mp4" for job in jobs_of(options))


@pytest.mark.parametrize(("page", "words"), of("weights"))
def test_every_weights_command_is_understood(page, words):
    if len(words) == 0:
        return
    options = parse(weights_cli.parser_of(words[0]), words[1:])
    if "manifest" not in options and words[0] not in ("inspect",):
        select(options.get("sets", []), load_manifest())


@pytest.mark.parametrize(("page", "words"), of("doctor"))
def test_every_doctor_command_is_understood(page, words):
    parse(doctor._parser(), words)


@pytest.mark.parametrize(("page", "words"), of("import-workflow"))
def test_every_import_is_understood(page, words, no_files):
    with pytest.raises(MediaError, match=r"\.json"):  # and not that an option is wrong
        workflow_cli.main(words)


@pytest.mark.parametrize("page", HOW_TO)
def test_a_how_to_has_a_command_for_its_pipelines(page):
    made = [job.pipeline for name, words in of("run") if name == page for job in jobs(words)]
    assert set(made) >= set(HOW_TO[page])


def jobs(words: list[str]):
    options = parse(run_parser(), words)
    return (
        jobs_of(options) if "image" in options or "prompt" in options or "video" in options else []
    )


def benchmark_commands() -> list[tuple[str, str]]:
    return [
        pair
        for page, text in shell_texts()
        if page == "benchmarks/README.md" or True
        for pair in BENCHMARK.findall(text)
    ]


@pytest.mark.parametrize(("name", "words"), benchmark_commands())
def test_every_benchmark_command_is_understood(name, words, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(words)])
    if hasattr(module, "parse"):
        module.parse()
    else:
        source = Path(module.__file__ or "").read_text()
        assert all(f'"{word}"' in source for word in shlex.split(words) if word.startswith("--"))


def anchors(page: Path) -> set[str]:
    """Returns the names that headings of a page have in a link."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert ROOT in file.resolve().parents
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_readme():
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = LINK.findall(page.read_text())
        todo += [Path(os.path.normpath(page.parent / link.partition("#")[0])) for link in links]
    assert [page.name for page in PAGES if page not in seen] == []


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", makefile(), re.MULTILINE))
    for name, body in blocks("sh"):
        for line in re.findall(r"^make ([a-z -]+)", joined(body), re.MULTILINE):
            assert set(line.split()) <= targets, name


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
