"""What the documents say can be done: links, make targets, commands, the example in Python."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.test_architecture import LEVELS
from xicon_infer import doctor, weights_cli, workflow_cli
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.job_flags import jobs_of, parse, run_parser
from xicon_infer.weights.manifest import load_manifest
from xicon_infer.weights_cli_text import select

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for folder in ("", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")
)
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:xicon-infer|python -m xicon_infer\.run) +([^\n]+)")
INLINE = re.compile(r"`xicon-infer ([^`\n]+)`")
BENCHMARK = re.compile(r"python (?:-m benchmarks\.|benchmarks/)(\w+)(?:\.py)? *([^\n`]*)")
NAMES = ("run", "weights", "import-workflow", "doctor")
PATTERN = re.compile(r"\b(FILE|SET|PATH|NAME)\b|\.\.\.|…|[|\[]")
"""What a line has that shows the form of a command and is none."""
HOW_TO = {
    "README.md": {"scail", "steady_dancer", "wan_i2v", "wan_t2v", "pose"},
    "scail.md": {"scail", "pose"},
    "steady-dancer.md": {"steady_dancer"},
    "wan-video.md": {"wan_i2v", "wan_t2v"},
    "pose.md": {"pose"},
    "Makefile": {"scail", "steady_dancer", "wan_i2v", "wan_t2v", "pose"},
}


def plain(text: str) -> str:
    """Returns shell text with one command a line and without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(re.sub(r"(^|\s)#\s.*", "", line) for line in lines)


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Returns page and text of every block in these languages."""
    return [
        (page.name, body)
        for page in PAGES
        for language, body in FENCE.findall(page.read_text())
        if language in languages
    ]


def shell_texts() -> list[tuple[str, str]]:
    """Returns page and text of the Makefile and of blocks for the shell or without a language."""
    found = [*blocks("sh", "bash", "console", ""), ("Makefile", (ROOT / "Makefile").read_text())]
    return [(name, plain(text)) for name, text in found]


def commands() -> list[tuple[str, list[str]]]:
    """Returns page and words behind `xicon-infer` of every whole command, also in the text."""
    found = [(name, words) for name, text in shell_texts() for words in COMMAND.findall(text)]
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        found += [(page.name, words) for words in INLINE.findall(text)]
    whole = [pair for pair in found if not PATTERN.search(re.sub(r"'[^']*'", "", pair[1]))]
    return [(name, split(words)) for name, words in dict.fromkeys(whole)]


def split(text: str) -> list[str]:
    """Returns the words of a command up to a redirection; an option alone belongs to `run`."""
    words = shlex.split(text.replace("$(OUT)", "outputs"))
    words = words[: words.index(">")] if ">" in words else words
    return ["run", *words] if words[0].startswith("-") else words


def of(name: str) -> list[tuple[str, list[str]]]:
    """Returns page and arguments of the commands of that name."""
    return [(page, words[1:]) for page, words in commands() if words[0] == name]


def pipelines_on(page: str) -> set[str]:
    """Returns the pipelines that the commands of a page make something with."""
    made = set()
    for name, words in of("run"):
        options = parse(run_parser(), words) if name == page and "--output" in words else {}
        made |= {job.pipeline for job in (jobs_of(options) if options else [])}
    return made


def test_there_are_commands_of_every_kind():
    assert {page for page, _ in of("run")} >= {"README.md", "scail.md", "pose.md", "Makefile"}
    assert {page for page, _ in of("weights")} >= {"README.md", "weights.md"}
    assert {page for page, _ in of("import-workflow")} >= {"migrate-from-comfyui.md"}
    assert {page for page, _ in of("doctor")} >= {"README.md"}


def test_every_command_has_a_known_name():
    assert {words[0] for _, words in commands()} == set(NAMES)


@pytest.mark.parametrize(("page", "words"), of("run"))
def test_every_run_is_understood(page, words):
    if "--help" in words:
        return
    options = parse(run_parser(), words)
    if "image" in options or "prompt" in options or "video" in options:
        assert all(job.output.suffix == ".mp4" for job in jobs_of(options))


@pytest.mark.parametrize(("page", "words"), of("weights"))
def test_every_weights_command_is_understood(page, words):
    assert set(words[:1]) <= set(weights_cli.COMMANDS)
    if len(words) < 2:  # its name in a sentence
        return
    options = parse(weights_cli.parser_of(words[0]), words[1:])
    named = [*options.get("sets", []), *options.get("keep", [])]
    if words[0] not in ("inspect", "prepare"):
        select(named, load_manifest())


@pytest.mark.parametrize(("page", "words"), of("doctor"))
def test_every_doctor_command_is_understood(page, words):
    parse(doctor._parser(), words)


@pytest.mark.parametrize(("page", "words"), [(p, w) for p, w in of("import-workflow") if w])
def test_every_import_is_understood(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match=r"\.json"):  # the file is missing, no option is wrong
        workflow_cli.main(words)


def test_a_wrong_command_would_be_seen():
    with pytest.raises(InvalidRequest):
        parse(run_parser(), ["--imgae", "a.png"])
    with pytest.raises(InvalidRequest):
        select(["scail/fp9"], load_manifest())


@pytest.mark.parametrize("page", HOW_TO)
def test_a_how_to_makes_something_with_its_pipelines(page):
    assert pipelines_on(page) >= HOW_TO[page]


@pytest.mark.parametrize(
    ("name", "words"),
    sorted({pair for _, text in shell_texts() for pair in BENCHMARK.findall(text)}),
)
def test_every_benchmark_command_is_understood(name, words, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    source = (ROOT / "benchmarks" / f"{name}.py").read_text()
    flags = [word for word in shlex.split(words) if word.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in source] == []
    if parser := getattr(module, "parse", None):
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(words)])
        parser()


def test_every_benchmark_is_explained():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    helpers = {name for name in scripts if f"{name.rsplit('_', 1)[0]}.py" in scripts}
    assert [name for name in sorted(scripts - helpers) if f"`{name}`" not in page] == []


def anchors(page: Path) -> set[str]:
    """Returns the names that the headings of a page have in a link."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_readme():
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page not in PAGES:
            continue
        seen.add(page)
        links = LINK.findall(page.read_text())
        todo += [Path(os.path.normpath(page.parent / link.partition("#")[0])) for link in links]
    assert [page.name for page in PAGES if page not in seen] == []


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [plain(body) for _, body in blocks("sh")]
    texts += [f"make {name}" for page in PAGES for name in named_targets(page)]
    for text in texts:
        for line in re.findall(r"^make ([a-z -]+)", text, re.MULTILINE):
            assert set(line.split()) <= targets, line


def named_targets(page: Path) -> list[str]:
    return re.findall(r"`make ([a-z-]+)`", page.read_text())


def test_the_example_in_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (source,) = [body for name, body in blocks("python") if name == "README.md"]
    exec(compile(source, "README.md", "exec"), {})
    assert "(17, 224, 128, 3)" in capsys.readouterr().out


def test_the_first_screen_has_both_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md"])
def test_the_first_pages_are_short(page):
    assert len((ROOT / page).read_text().splitlines()) <= 150


def test_the_levels_are_those_of_the_code():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    lines = re.findall(r"^ ?(\d+)  (.+?)(?:  .*)?$", page, re.MULTILINE)
    written = {int(number): set(names.split()) for number, names in lines}
    real = {n: {unit.removeprefix("xicon_infer.") for unit in row} for n, row in enumerate(LEVELS)}
    assert written == real
