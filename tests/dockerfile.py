"""A small reader of Dockerfiles: instructions, stages, and the rules that every image should keep.

Knows what the project's Dockerfile uses: continued lines, comments, flags, JSON forms. No here
documents, no escapes other than the backslash at the end of a line.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECRET = re.compile(r"token|secret|passw|api_?key|credential|private_?key", re.IGNORECASE)
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN|ghp_[A-Za-z0-9]{20,}")
VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    word: in upper case. flags: as "--from=base". text: the rest, without flags. line: of the file.
    """

    word: str
    flags: tuple[str, ...]
    text: str
    line: int

    def flag(self, name: str) -> str:
        """Returns the value of a flag, "" if it is not there."""
        return next((f.split("=", 1)[1] for f in self.flags if f.startswith(f"--{name}=")), "")

    @property
    def words(self) -> list[str]:
        """Returns the text as words: of the JSON form, or split like a shell does."""
        if self.is_exec:
            return json.loads(self.text)
        return shlex.split(self.text)

    @property
    def is_exec(self) -> bool:
        """Returns whether the text is a JSON list of texts."""
        if not self.text.startswith("["):
            return False
        try:
            words = json.loads(self.text)
        except ValueError:
            return False
        return isinstance(words, list) and all(isinstance(word, str) for word in words)


@dataclass(frozen=True)
class Stage:
    """One stage: its base (an image, or the name of a stage before), its name, what it does."""

    base: str
    name: str
    steps: tuple[Instruction, ...]

    def of(self, word: str) -> list[Instruction]:
        """Returns the instructions of one kind."""
        return [step for step in self.steps if step.word == word]


def instructions(text: str) -> list[Instruction]:
    """Returns the instructions of a Dockerfile, in order."""
    found: list[Instruction] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or pending):
            continue
        start = start if pending else number
        pending += line.strip().removesuffix("\\") + " "
        if not line.rstrip().endswith("\\"):
            found.append(_instruction(pending.strip(), start))
            pending = ""
    return found


def _instruction(text: str, line: int) -> Instruction:
    word, _, rest = text.partition(" ")
    flags = []
    while match := re.match(r"\s*(--[a-z-]+(?:=\S+)?)\s", rest):
        flags.append(match[1])
        rest = rest[match.end() :]
    return Instruction(word.upper(), tuple(flags), rest.strip(), line)


def stages(text: str) -> list[Stage]:
    """Returns the stages of a Dockerfile, in order."""
    found: list[Stage] = []
    for step in instructions(text):
        if step.word == "FROM":
            base, name = re.fullmatch(r"(\S+)(?: [Aa][Ss] (\S+))?", step.text).groups()
            found.append(Stage(base, name or str(len(found)), ()))
        elif found:
            last = found[-1]
            found[-1] = Stage(last.base, last.name, (*last.steps, step))
    return found


def chain(text: str, name: str | None = None) -> list[Instruction]:
    """Returns what makes a stage, its bases first; the last stage if None."""
    every = {stage.name: stage for stage in stages(text)}
    stage = every[name] if name else list(every.values())[-1]
    before = chain(text, stage.base) if stage.base in every else []
    return [*before, *stage.steps]


def problems(text: str) -> list[str]:
    """Returns a sentence for each rule that is broken."""
    found = [*_base_problems(text), *_argument_problems(text), *_end_problems(text)]
    for step in instructions(text):
        found += [f"line {step.line}: {problem}" for problem in _step_problems(step)]
    return found


def _base_problems(text: str) -> Iterator[str]:
    names: set[str] = set()
    for stage in stages(text):
        if stage.base not in names and stage.base != "scratch":
            tag = stage.base.partition("@")[0].rpartition("/")[2].partition(":")[2]
            if not re.search(r"\d+\.\d+\.\d+", tag) and "@sha256:" not in stage.base:
                yield f"base {stage.base} has no exact version"
        names.add(stage.name)


def _argument_problems(text: str) -> Iterator[str]:
    every = instructions(text)
    for number, step in enumerate(every):
        if step.word not in ("ARG", "ENV"):
            continue
        for name, value in re.findall(r"([A-Za-z_][A-Za-z0-9_]*)=?(\"[^\"]*\"|\S*)", step.text):
            if SECRET.search(name) or SECRET_VALUE.search(value):
                yield f"line {step.line}: {step.word} {name} looks like a secret"
        if step.word == "ARG":
            name = re.match(r"\w+", step.text)[0]
            later = "\n".join(
                f"{' '.join(s.flags)} {s.text}" for s in _until_from(every[number + 1 :])
            )
            if name not in VARIABLE.findall(later):
                yield f"line {step.line}: ARG {name} is not used in its stage"


def _until_from(steps: list[Instruction]) -> Iterator[Instruction]:
    for step in steps:
        if step.word == "FROM":
            return
        yield step


def _step_problems(step: Instruction) -> Iterator[str]:
    if step.word == "ADD":
        yield "ADD fetches and unpacks; use COPY"
    if step.word == "MAINTAINER":
        yield "MAINTAINER is deprecated"
    if step.word == "HEALTHCHECK":
        yield "a health check means nothing on a serverless platform"
    if step.word in ("CMD", "ENTRYPOINT") and not step.is_exec:
        yield f"{step.word} must be a JSON list, else signals reach a shell"
    if step.word == "WORKDIR" and not step.text.startswith("/"):
        yield "WORKDIR must be absolute"
    if step.word == "COPY" and len(step.words) > 2 and not step.words[-1].endswith("/"):
        yield "COPY of several files needs a folder with a slash"
    if step.word == "RUN":
        yield from _run_problems(step.text)


def _run_problems(text: str) -> Iterator[str]:
    if re.search(r"\bapt-get (upgrade|dist-upgrade)|\bapt install", text):
        yield "apt-get upgrade and apt are not for images"
    if "apt-get install" in text:
        if "--no-install-recommends" not in text:
            yield "apt-get install without --no-install-recommends"
        if "apt-get update" not in text or "rm -rf /var/lib/apt/lists/*" not in text:
            yield "apt-get lists must be fetched and removed in the same step"
    for command in re.findall(r"\bpip install[^&|;]*", text):
        if "--no-cache-dir" not in command:
            yield "pip install keeps its cache"
        if "--requirement" not in command and "--no-deps" not in command:
            yield "pip install takes whatever versions there are"
    if re.search(r"\b(curl|wget|git clone|sudo|ssh)\b", text):
        yield "fetches by hand, or is root twice"
    if re.search(r"chmod\s+(-R\s+)?777", text):
        yield "777 lets everybody write"


def _end_problems(text: str) -> Iterator[str]:
    last = chain(text)
    users = [step.text for step in last if step.word == "USER"]
    if not users or re.match(r"(root|0)\b", users[-1]):
        yield "the last USER is root"
    if users and last.index(next(s for s in last if s.word == "USER")) < max(
        number for number, step in enumerate(last) if step.word in ("RUN", "COPY")
    ):
        yield "something is copied or run after USER"
    for word in ("ENTRYPOINT", "CMD"):
        if sum(step.word == word for step in last) != 1:
            yield f"there must be one {word}"


def ignored(path: str, rules: str) -> bool:
    """Returns whether .dockerignore keeps a path out: the last rule that fits decides.

    Args:
        path: relative, with forward slashes.
        rules: the text of .dockerignore.
    """
    result = False
    parts = Path(path).parts
    for line in rules.splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").strip("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(_fits(head, pattern) for head in heads):
            result = not rule.startswith("!")
    return result


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(
            _fits("/".join(Path(path).parts[n:]), pattern[3:]) for n in range(len(Path(path).parts))
        )
    same_depth = path.count("/") == pattern.count("/")
    return same_depth and fnmatch.fnmatchcase(path, pattern)
