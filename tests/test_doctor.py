"""`xicon-infer doctor`."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.check_probes import GOOD, raising
from xicon_infer import doctor, doctor_findings
from xicon_infer.doctor import Finding, examine, format_report
from xicon_infer.doctor_findings import WORKER, tiny_can_run
from xicon_infer.doctor_text import show
from xicon_infer.errors import BackendUnavailable
from xicon_infer.run import main
from xicon_infer.weights.manifest import files_for

ROOT = Path(__file__).parents[1]


def test_this_machine_can_run_the_tiny_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "The tiny preset can run here." in text
    for group in (
        "python",
        "packages",
        "torch",
        "attention",
        "video",
        "pose",
        "weights",
        "disk",
        "worker",
    ):
        assert f"\n{group}\n" in f"\n{text}"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tiny_can_run"] is True
    names = {finding["name"] for finding in report["findings"]}
    assert {"torch", "libx264", "aac", "math", "xformers", "onnxruntime", "scail/fp8"} <= names
    assert {"torchvision", "ultralytics", "pose/default", "pose/commercial"} <= names


def test_versions_are_those_installed() -> None:
    found = {finding.name: finding.text for finding in examine([])}
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["torch"].partition("+")[0] == importlib.metadata.version("torch").partition("+")[0]


def test_pose_packages_and_their_terms() -> None:
    found = {finding.name: finding for finding in examine([]) if finding.group == "pose"}
    assert list(found) == ["onnxruntime", "torchvision", "ultralytics"]
    assert "AGPL-3.0" in found["ultralytics"].text
    assert not any(finding.needed for finding in found.values())


def test_pose_weights_found_and_missing(tmp_path: Path) -> None:
    entries = files_for("pose", "default")
    (tmp_path / entries[0].names[0]).write_bytes(b"x")
    found = {f.name: f for f in examine([tmp_path]) if f.group == "weights"}["pose/default"]
    assert (found.state, found.needed) == ("absent", False)
    assert found.text.startswith(f"1 of {len(entries)} files; missing: ")
    assert "nlf" in found.text


def test_every_absent_kernel_has_a_reason() -> None:
    kernels = [finding for finding in examine([]) if finding.group == "attention"]
    assert any(finding.state == "ok" for finding in kernels)
    assert all(bool(finding.text) == (finding.state != "ok") for finding in kernels)


def test_missing_weights_are_named_and_found_ones_counted(tmp_path: Path) -> None:
    entries = files_for("scail", "fp8")
    (tmp_path / entries[0].names[0]).write_bytes(b"x")
    found = {f.name: f for f in examine([tmp_path]) if f.group == "weights"}
    assert found["scail/fp8"].text.startswith(f"1 of {len(entries)} files; missing: ")
    assert entries[0].names[0] not in found["scail/fp8"].text
    assert entries[1].names[0] in found["scail/fp8"].text
    for entry in entries:
        (tmp_path / entry.names[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry.names[0]).write_bytes(b"x")
    found = {f.name: f for f in examine([tmp_path]) if f.group == "weights"}
    assert (found["scail/fp8"].state, found["scail/bf16"].state) == ("ok", "absent")


def test_one_missing_need_is_enough() -> None:
    good = Finding("g", "a", "ok", "1", needed=True)
    optional = Finding("g", "b", "absent", "not installed")
    missing = Finding("g", "c", "problem", "not installed", needed=True)
    assert tiny_can_run([good, optional])
    assert not tiny_can_run([good, missing])
    assert "The tiny preset CANNOT run here." in format_report([missing])


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise {error}('blocked by the test')
sys.meta_path.insert(0, Block())
from xicon_infer.errors import BackendUnavailable
from xicon_infer.run import main
sys.exit(main(['doctor', '--json']))
"""


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_package_that_cannot_be_imported_is_reported(error: str) -> None:
    code = BLOCKED.format(
        blocked={"torch", "av", "onnxruntime", "torchvision", "ultralytics"}, error=error
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 6, out.stderr
    found = {f["name"]: f for f in json.loads(out.stdout)["findings"]}
    assert (found["torch"]["state"], found["av"]["state"]) == ("problem", "problem")
    assert "blocked by the test" in found["torch"]["text"]
    for name in ("onnxruntime", "torchvision", "ultralytics"):
        assert found[name]["state"] == "absent"
        assert "blocked by the test" in found[name]["text"]


def test_ultralytics_is_not_imported() -> None:
    code = (
        "import sys\nfrom xicon_infer.doctor import examine\nexamine([])\n"
        "print('ultralytics' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "False"


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err


def test_models_dir_is_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--models-dir", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out


def test_missing_package_with_find_spec() -> None:
    absent = doctor_findings._package("no_such_module_here", "nothing", needed=False)
    assert (absent.state, absent.text) == ("absent", "not installed")
    assert (
        doctor_findings._package("no_such_module_here", "nothing", needed=True).state == "problem"
    )


# ---- the checks of a worker's start ---------------------------------------------------------


def worker_report(capsys, *words: str, env=None, probes=GOOD):
    code = doctor.main(["--json", *words], env=env or {"XICON_PRESET": "tiny"}, probes=probes)
    return code, json.loads(capsys.readouterr().out)


def test_the_checks_of_a_worker_are_part_of_the_report(capsys):
    code, report = worker_report(capsys)
    shown = {f["name"]: f for f in report["findings"] if f["group"] == WORKER}
    assert {"nvidia-smi", "gpu", "cudnn", "fp8", "onnxruntime", "weights scail"} <= set(shown)
    assert shown["fp8"]["text"] == "dequant, scaled_mm_row, scaled_mm_tensor"
    assert (code, report["tiny_can_run"]) == (0, True)


def test_a_worker_that_cannot_start(capsys):
    env = {"XICON_PRESET": "tiny", "XICON_MODES": "scail"}
    broken = replace(GOOD, matmul=raising(RuntimeError("no kernel image")))
    code, report = worker_report(capsys, "--worker", env=env, probes=broken)
    assert (code, report["worker_can_start"]) == (6, False)
    (kernels,) = [f for f in report["findings"] if f["name"] == "kernels"]
    assert kernels["state"] == "problem"
    assert kernels["fix"]
    code, report = worker_report(capsys, "--worker", env=env)
    assert (code, report["worker_can_start"]) == (0, True)
    assert {f["group"] for f in report["findings"]} == {WORKER}


def test_without_worker_its_problems_are_one_line(capsys):
    """Who makes videos on this machine is not told five times that weights are missing."""
    env = {"XICON_MODES": "scail,wan_t2v"}
    assert doctor.main([], env=env, probes=GOOD) == 0
    report = capsys.readouterr().out
    lines = report[report.index("\nworker\n") :].splitlines()
    assert not [line for line in lines if line.strip().startswith("problem")]
    (line,) = [line for line in lines if "would not start" in line]
    assert "weights scail, weights wan_t2v" in line
    assert "doctor --worker" in "\n".join(lines)
    assert doctor.main(["--worker"], env=env, probes=GOOD) == 6
    assert "problem  weights scail" in capsys.readouterr().out
    assert doctor.main([], env={"XICON_PRESET": "tiny"}, probes=GOOD) == 0
    assert "would not start" not in capsys.readouterr().out


def test_without_worker_a_gpu_may_be_absent(capsys):
    none = replace(GOOD, gpu=raising(BackendUnavailable("PyTorch sees no GPU")))
    env = {"XICON_MODES": "scail"}
    for words, state in (((), "absent"), (("--worker",), "problem")):
        _, report = worker_report(capsys, *words, env=env, probes=none)
        (gpu,) = [f for f in report["findings"] if (f["group"], f["name"]) == (WORKER, "gpu")]
        assert gpu["state"] == state


def test_settings_that_are_wrong_are_all_named(capsys):
    env = {"XICON_MODSE": "scail", "XICON_MEMORY": "huge"}
    code, report = worker_report(capsys, "--worker", env=env)
    (finding,) = report["findings"]
    assert code == 6
    assert "did you mean XICON_MODES?" in finding["text"]
    assert "XICON_MEMORY" in finding["text"]


def test_settings_decide_what_is_checked(capsys):
    _, report = worker_report(capsys, env={"XICON_MODES": "wan_t2v"})
    names = {f["name"] for f in report["findings"] if f["group"] == WORKER}
    assert "weights wan_t2v" in names
    assert "weights scail" not in names


def test_the_plain_report_says_what_to_do():
    bad = Finding(WORKER, "gpu", "problem", "there is none", fix="rent one")
    assert "-> rent one" in format_report([bad])
    assert "A worker CANNOT start here." in format_report([bad])
    assert "A worker can start here." in format_report([replace(bad, state="ok")])
    assert "rent one" not in format_report([replace(bad, state="ok")])


def test_the_table_of_a_terminal():
    console = Console(width=90, record=True, file=io.StringIO())
    show([Finding("torch", "gpu 0", "problem", "[none] here", fix="rent one")], console)
    text = console.export_text()
    for word in ("torch", "gpu 0", "problem", "[none] here", "rent one"):
        assert word in text


def test_a_terminal_gets_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert doctor.main(["--worker"], env={"XICON_PRESET": "tiny"}, probes=GOOD) == 0
    out = capsys.readouterr().out
    assert "─" in out
    assert "A worker can start here." in out
