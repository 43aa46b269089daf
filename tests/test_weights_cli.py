"""`xicon-infer weights`: help, exit codes, JSON, and each subcommand with fakes at the boundary."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.weights_cli_tools import by_id, isolate, put, run, run_json
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.job_flags import parse
from xicon_infer.runtime import COMFYUI_VARIABLES
from xicon_infer.types import SilentProgress
from xicon_infer.weights.manifest import COMFYUI_FOLDERS, files_for, load_manifest
from xicon_infer.weights_cli import COMMANDS, main, parser_of
from xicon_infer.weights_cli_text import select, size_text
from xicon_infer.weights_cli_work import Workers

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"```sh\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)


# ---- arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_examples(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"xicon-infer weights {COMMANDS[name].examples[0]}" in text
    assert all(flag in text for flag in ("--json", "--debug", "--quiet"))


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_overview_names_every_subcommand(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and COMMANDS[name].help in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_parse(name):
    for example in COMMANDS[name].examples:
        command, *words = example.split()
        assert command == name
        parse(parser_of(name), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "unknown subcommand 'bogus': weights has list, pull, verify"),
        (["--nope"], "unknown option --nope"),
        (["list", "--nope"], "unknown option --nope"),
        (["list", "--jsn"], "did you mean --json"),
        (["list", "scial"], "did you mean scail"),
        (["list", "scail/int4"], "scail/fp8, scail/bf16, scail/low-memory, scail/tiny"),
        (["list", "dance"], "known are scail, steady_dancer, wan_i2v, wan_t2v, pose"),
        (["pull"], "name what to fetch"),
        (["pull", "scail", "--jobs", "0"], "from 1 to 32, got '0'"),
        (["verify", "--jobs", "x"], "from 1 to 32, got 'x'"),
        (["prepare"], "TRANSFORMER"),
        (["prepare", "x"], "'output' is missing"),
        (["prepare", "x", "--storage", "int4"], "fp8"),
        (["inspect"], "FILE"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(InvalidRequest, match=message):
        main(words)


def test_list_and_help_load_nothing_heavy():
    code = (
        "import contextlib, io, sys\nfrom xicon_infer.weights_cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['list'])\n"
        "print(sorted(set(sys.modules) & {'torch', 'huggingface_hub', 'numpy', 'rich', 'yaml'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]"


def test_sets():
    manifest = load_manifest()
    assert [one.name for one in select(["scail", "pose/light", "nlf"], manifest)] == [
        "scail/fp8",
        "pose/light",
        "nlf",
    ]
    assert [e.id for e in select(["nlf"], manifest)[0].entries] == ["nlf"]
    every = [one.name for one in select([], manifest)]
    assert "scail/tiny" not in every
    assert {"scail/bf16", "wan_i2v/fp8-720p", "pose/dwpose"} <= set(every)
    assert select(["scail/tiny"], manifest)[0].entries == ()


def test_sizes_for_people():
    sizes = [None, 0, 999, 1000, 1_500_000, 16_400_000_000, 3 * 10**12]
    shown = ["?", "0 B", "999 B", "1 kB", "1.5 MB", "16.4 GB", "3.0 TB"]
    assert [size_text(size) for size in sizes] == shown


# ---- list


def test_list_says_what_is_there_and_what_is_missing(capsys, tmp_path):
    vae = put(tmp_path / "vae" / "Wan2_1_VAE_fp32.safetensors", "12345")
    code, out = run(capsys, "list", "scail/fp8", "--models-dir", tmp_path)
    assert code == 0
    assert "scail/fp8 (1 of 6 files, the default)" in out
    assert f"present  wan-vae{'':<25}      5 B  {vae} (wan-vae-fp32)" in out
    assert "missing  scail-14b-fp8" in out
    assert "SCAIL/Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ.safetensors in Kijai" in out
    assert f"searched: {tmp_path}" in out
    entries = files_for("scail", "fp8")
    unknown = sum(e.size_bytes is None for e in entries)
    known = sum(e.size_bytes or 0 for e in entries if e.id != "wan-vae")
    assert f"missing: 5 files, {size_text(known)} and {unknown} of unknown size" in out


def test_list_shows_a_wrong_size(capsys, tmp_path):
    put(tmp_path / "vae" / "Wan2.1_VAE.pth", "12345")
    _, out = run(capsys, "list", "wan-vae", "--models-dir", tmp_path)
    assert "WRONG SIZE, 507609880 bytes are listed" in out
    assert "missing: nothing" in out


def test_list_as_json(capsys, tmp_path):
    vae = put(tmp_path / "vae" / "Wan2_1_VAE_fp32.safetensors", "12345")
    code, report = run_json(capsys, "list", "scail/fp8", "--models-dir", tmp_path)
    files = {file["id"]: file for file in report["files"]}
    assert code == 0
    assert report["searched"] == [str(tmp_path)]
    assert report["sets"] == {"scail/fp8": [e.id for e in files_for("scail", "fp8")]}
    assert (files["wan-vae"]["path"], files["wan-vae"]["published"]) == (str(vae), "wan-vae-fp32")
    assert files["wan-vae"]["size_bytes"] == 5
    assert files["scail-14b-fp8"]["path"] is None
    assert "wan-vae" not in report["missing"]
    assert report["missing_of_unknown_size"] >= 1


def test_list_without_words_shows_every_preset(capsys):
    _, out = run(capsys, "list")
    for pipeline, names in load_manifest().presets.items():
        for preset in names:
            assert (f"{pipeline}/{preset} (" in out) == (preset != "tiny")
    assert "searched: no folder that exists" in out


# ---- pull


class Pull:
    """A fake of `download.pull` that makes small files."""

    def __init__(self):
        self.calls = []

    def __call__(self, entries, folder, **options):
        progress = options.pop("progress")
        self.calls.append(([e.id for e in entries], folder, options))
        with progress.stage("download"):
            return [self.make(entry, folder) for entry in entries]

    def make(self, entry, folder):
        return Pulled(entry, put(folder / entry.target), "downloaded")


@dataclass(frozen=True)
class Pulled:
    entry: object
    path: Path
    state: str


def test_pull_fetches_what_a_set_needs(capsys, tmp_path):
    pull = Pull()
    target = tmp_path / "target"
    words = ("pull", "scail/fp8", "pose/light", "--models-dir", target)
    code, out = run(capsys, *words, workers=Workers(pull=pull))
    ids = [e.id for e in (*files_for("scail", "fp8"), *files_for("pose", "light"))]
    assert code == 0
    assert pull.calls == [(ids, target, {"jobs": 4, "offline": False, "verify": True})]
    assert all(name in out for name in ids)
    assert "downloaded" in out
    _, out = run(capsys, "list", "scail/fp8", "--models-dir", target)
    assert "missing: nothing" in out


def test_every_option_of_pull_counts(capsys, tmp_path):
    pull = Pull()
    flags = ("--jobs", "9", "--offline", "--no-verify", "--quiet")
    run(capsys, "pull", "nlf", *flags, workers=Workers(pull=pull))
    assert pull.calls == [(["nlf"], Path("models"), {"jobs": 9, "offline": True, "verify": False})]


def test_pull_leaves_alone_what_a_comfyui_has(capsys, tmp_path, monkeypatch):
    comfyui = tmp_path / "ComfyUI"
    there = put(comfyui / "models" / "vae" / "Wan2_1_VAE_fp32.safetensors")
    wrong = put(comfyui / "models" / "clip_vision" / "clip_vision_h.safetensors")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    pull = Pull()
    code, report = run_json(capsys, "pull", "scail/fp8", workers=Workers(pull=pull))
    assert code == 0
    fetched = pull.calls[0][0]
    assert "wan-vae" not in fetched
    assert "clip-vit-h" in fetched, "a copy of the wrong size is not used"
    rows = {row["id"]: row for row in report["files"]}
    assert rows["wan-vae"] == {"id": "wan-vae", "path": str(there), "state": "present"}
    assert rows["clip-vit-h"]["path"] != str(wrong)


def test_pull_warns_of_licences_that_bind(capsys):
    progress = SilentProgress()
    workers = Workers(pull=Pull(), progress=lambda: progress)
    run(capsys, "pull", "pose/default", "--models-dir", "a", workers=workers)
    assert len(progress.warnings) == 2
    assert progress.warnings[0].startswith("yolov10m: licence: AGPL-3.0 (THU-MIG/yolov10")
    assert progress.warnings[1].startswith("nlf: licence: non-commercial research only (isarandi")
    told = progress.warnings.copy()
    run(capsys, "pull", "nlf", "--quiet", workers=workers)
    assert progress.warnings == told, "--quiet shows nothing"
    _, report = run_json(capsys, "pull", "nlf", "--models-dir", "b", workers=workers)
    assert report["warnings"] == []  # it lies in ./models by now
    Path("models/nlf/nlf_l_multi_0.3.2.torchscript").unlink()
    _, report = run_json(capsys, "pull", "nlf", "--models-dir", "c", workers=workers)
    assert report["warnings"] == told[1:]


def test_pull_can_be_tried_without_fetching(capsys):
    pull = Pull()
    workers = Workers(pull=pull)
    code, out = run(capsys, "pull", "wan_t2v/1.3b", "--dry-run", "--quiet", workers=workers)
    assert (code, pull.calls) == (0, [])
    assert "fetch    wan21-t2v-1.3b-bf16" in out
    assert "into models" in out
    there = put(Path("models/vae/Wan2_1_VAE_fp32.safetensors"))
    report = run_json(capsys, "pull", "wan-vae", "--dry-run", workers=workers)[1]
    assert (report["fetch"], report["present"]) == ([], {"wan-vae": str(there)})
    there.unlink()
    code, report = run_json(capsys, "pull", "wan-vae", "--dry-run", workers=workers)
    assert report["fetch"] == ["wan-vae"]
    assert report["known_bytes"] == 507609880
    assert pull.calls == []


def test_the_real_pull_offline(capsys, tmp_path):
    """The function behind it: what is there is found, what is missing is named."""
    entry = by_id("dwpose")
    with pytest.raises(WeightsError, match=r"offline: 1 files are not in .*dwpose"):
        main(["pull", "dwpose", "--offline", "--models-dir", str(tmp_path), "--quiet"])
    path = tmp_path / entry.target
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(entry.size_bytes)
    code, report = run_json(capsys, "pull", "dwpose", "--offline", "--models-dir", tmp_path)
    assert code == 0
    assert report["files"] == [{"id": "dwpose", "path": str(path), "state": "present"}]


# ---- documents


def commands():
    page = (ROOT / "docs" / "weights.md").read_text().replace("\\\n", " ")
    return re.findall(r"xicon-infer weights ([^\n#`]+)", "".join(FENCE.findall(page)))


def test_every_command_of_the_page_is_understood():
    used = set()
    for text in commands():
        name, *words = shlex.split(text)
        options = parse(parser_of(name), words)
        select(options.get("sets", []), load_manifest())
        used.add(name)
    assert used == set(COMMANDS)


def test_the_page_names_every_preset():
    page = (ROOT / "docs" / "weights.md").read_text()
    for pipeline, names in load_manifest().presets.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{pipeline}` |")]
        assert set(names) <= set(re.findall(r"`([^`]+)`", row))


def test_the_page_names_every_comfyui_folder():
    page = (ROOT / "docs" / "weights.md").read_text()
    assert all(f"`{name}`" in page for names in COMFYUI_FOLDERS.values() for name in names)
    assert all(f"`{name}`" in page for name in COMFYUI_VARIABLES)


@pytest.mark.parametrize("words", [("list",), ("verify",), ("prepare", "nlf", "--output", "o")])
def test_a_folder_that_does_not_exist_is_named(words, tmp_path):
    with pytest.raises(InvalidRequest, match=r"'models_dir' must be a folder .* got '.*absent'"):
        main([*words, "--models-dir", str(tmp_path / "absent")])
