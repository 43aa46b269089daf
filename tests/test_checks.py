"""The checks of a worker's start: what is checked, in which order, and what follows."""

from __future__ import annotations

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.check_probes import GOOD, VERSIONS, publish, raising
from xicon_infer import checks_weights
from xicon_infer.checks import (
    CheckNeeds,
    failures,
    needs_of,
    ready_modes,
    require,
    run_checks,
    sets_of,
)
from xicon_infer.checks_machine import check_python
from xicon_infer.errors import BackendUnavailable, MediaError
from xicon_infer.settings import read_settings
from xicon_infer.weights.manifest import files_for

NOTHING = CheckNeeds()
ORDER = (
    *("python", "packages", "temporary folder", "disk", "default video", "bucket", "nvidia-smi"),
    *("gpu", "kernels", "memory", "cudnn", "attention", "fp8", "onnxruntime", "weights wan_t2v"),
)


def state_of(name: str, needs: CheckNeeds = NOTHING, probes=GOOD) -> str:
    return result_of(name, needs, probes).state


def result_of(name: str, needs: CheckNeeds = NOTHING, probes=GOOD):
    (result,) = [r for r in run_checks(needs, probes=probes) if r.name == name]
    return result


def test_everything_is_checked_in_order_and_nothing_fails_on_a_good_machine(tmp_path):
    full = CheckNeeds(
        modes={"wan_t2v": ()}, tmp=tmp_path, bucket=lambda: None, default_video=Path("a.mp4")
    )
    results = run_checks(full, probes=GOOD)
    assert tuple(result.name for result in results) == ORDER
    assert {result.state for result in results} == {"ok"}
    assert all(result.text for result in results)
    assert failures(results) == ""
    require(results)


def test_the_time_of_each_check_is_measured():
    ticks = itertools.count(0.0, 0.25)
    results = run_checks(NOTHING, probes=GOOD, clock=lambda: next(ticks))
    assert {result.seconds for result in results} == {0.25}


def test_what_needs_a_gpu_is_left_out_without_one():
    probes = replace(GOOD, gpu=raising(BackendUnavailable("PyTorch sees no GPU")))
    results = run_checks(NOTHING, probes=probes)
    assert [r.name for r in results][-1] == "gpu"
    assert results[-1].state == "fail"
    assert "PyTorch sees no GPU" in failures(results)
    without = run_checks(replace(NOTHING, gpu=False), probes=probes)
    assert without[-1].state == "warn"
    assert failures(without) == ""


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 9, 18), "fail"), ((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warn")],
)
def test_python(version, state):
    assert check_python(version).state == state


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.11.0+cu128"}, "av is not installed"),
        ({"torch": "2.9.1", "av": "18"}, "torch is 2.9.1, 2.10 is the oldest"),
        ({"torch": "2.10.0", "av": "16.9"}, "av is 16.9, 17 is the oldest"),
    ],
)
def test_packages_that_are_absent_or_old(versions, said):
    result = result_of("packages", probes=replace(GOOD, version=lambda n: versions.get(n, "")))
    assert result.state == "fail"
    assert said in result.text
    assert result.fix


def test_packages_are_known_even_without_an_installation():
    source = replace(GOOD, requirements=list)
    assert state_of("packages", probes=source) == "ok"
    old = replace(source, version=lambda name: VERSIONS[name] if name == "av" else "2.0")
    assert state_of("packages", probes=old) == "fail"


def test_a_temporary_folder_that_cannot_be_written_to():
    result = result_of(
        "temporary folder", probes=replace(GOOD, write=raising(OSError("read-only")))
    )
    assert result.state == "fail"
    assert "read-only" in result.text
    assert "XICON_TMP" in result.fix


@pytest.mark.parametrize(
    ("free", "state"), [(1_999_999_999, "fail"), (2 * 10**9, "warn"), (10**10, "ok")]
)
def test_free_disk(free, state):
    assert state_of("disk", probes=replace(GOOD, free_bytes=lambda _: free)) == state


def test_the_disk_that_is_looked_at_is_that_of_the_temporary_folder(tmp_path):
    seen = []
    probes = replace(GOOD, free_bytes=lambda folder: seen.append(folder) or 10**12)
    run_checks(CheckNeeds(tmp=tmp_path), probes=probes)
    assert seen == [tmp_path]


def test_a_default_video_that_cannot_be_read():
    needs = CheckNeeds(default_video=Path("gone.mp4"))
    probes = replace(GOOD, video=raising(OSError("no such file")))
    result = result_of("default video", needs, probes)
    assert (result.state, "gone.mp4" in result.text) == ("fail", True)
    assert "XICON_DEFAULT_VIDEO" in result.fix
    broken = result_of("default video", needs, replace(GOOD, video=raising(MediaError("damaged"))))
    assert (broken.state, "damaged" in broken.text) == ("fail", True)


def test_storage_that_refuses():
    result = result_of("bucket", CheckNeeds(bucket=raising(RuntimeError("Access Denied"))))
    assert (result.state, "Access Denied" in result.text) == ("fail", True)
    ours = result_of("bucket", CheckNeeds(bucket=raising(MediaError("wrong key"))))
    assert (ours.state, ours.text) == ("fail", "wrong key")
    assert "BUCKET_SKIP_CHECK" in ours.fix
    odd = result_of("bucket", CheckNeeds(bucket=raising(subprocess.SubprocessError("odd"))))
    assert (odd.state, "odd" in odd.text) == ("fail", True)


def test_a_look_that_breaks_does_not_end_the_others():
    probes = replace(GOOD, attention=raising(AttributeError("module has no attribute")))
    results = {result.name: result for result in run_checks(NOTHING, probes=probes)}
    assert results["attention"].text == "cannot be checked: module has no attribute"
    assert results["attention"].state == "fail"
    assert results["onnxruntime"].state == "ok"


def test_all_failures_are_named_at_once():
    probes = replace(
        GOOD, write=raising(OSError("full")), matmul=raising(RuntimeError("no kernel"))
    )
    results = run_checks(NOTHING, probes=probes)
    with pytest.raises(BackendUnavailable, match=r"full.*no kernel") as caught:
        require(results)
    assert caught.value.code == "NOT_READY"
    assert "To do: set XICON_TMP" in failures(results)


# ---- weights -------------------------------------------------------------------------------


def needs_for(folder: Path, *modes: str, **more) -> CheckNeeds:
    sets = {mode: sets_of(mode, None) for mode in modes}
    return CheckNeeds(modes=sets, search_dirs=(folder,), **more)


@pytest.fixture
def small(monkeypatch):
    """Sizes that are pinned are forgotten: the real files have gigabytes."""
    plain = checks_weights.files_for

    def files(pipeline: str, preset: str):
        return tuple(
            replace(e, size_bytes=None, sha256=None, alternatives=())
            for e in plain(pipeline, preset)
        )

    monkeypatch.setattr(checks_weights, "files_for", files)


def test_missing_weights_are_named_with_the_command_that_gets_them(tmp_path):
    result = result_of("weights scail", needs_for(tmp_path, "scail"))
    assert result.state == "fail"
    for entry in (*files_for("scail", "fp8"), *files_for("pose", "default")):
        assert entry.names[0] in result.text
    assert str(tmp_path) in result.text
    assert "xicon-infer weights pull scail/fp8 pose/default" in result.fix


def test_weights_that_are_there(tmp_path, small):
    publish(tmp_path, files_for("wan_t2v", "fp8"))
    needs = needs_for(tmp_path, "wan_t2v", "wan_i2v")
    results = run_checks(needs, probes=GOOD)
    found = {result.name: result.state for result in results}
    assert (found["weights wan_t2v"], found["weights wan_i2v"]) == ("ok", "fail")
    assert ready_modes(needs, results) == ("wan_t2v",)


def test_one_complete_mode_is_enough_where_all_are_on_offer(tmp_path, small):
    needs = needs_for(tmp_path, "wan_t2v", "wan_i2v", any_mode=True)
    assert state_of("weights wan_i2v", needs) == "fail"
    publish(tmp_path, files_for("wan_t2v", "fp8"))
    assert state_of("weights wan_i2v", needs) == "warn"


def test_a_wrong_size_is_a_fault(tmp_path):
    (entry,) = [e for e in files_for("wan_t2v", "fp8") if e.component == "tokenizer"]
    path = tmp_path / entry.names[0]
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    text = result_of("weights wan_t2v", needs_for(tmp_path, "wan_t2v")).text
    assert f"{path.name}: has 2 bytes instead of {entry.size_bytes}" in text


def test_hashes_are_compared_only_if_asked(tmp_path, monkeypatch):
    entry = replace(files_for("pose", "default")[0], size_bytes=6, sha256="0" * 64, alternatives=())
    monkeypatch.setattr(checks_weights, "files_for", lambda *_: (entry,))
    (tmp_path / entry.names[0]).write_bytes(b"\x08\x07 abc")
    assert state_of("weights pose_only", needs_for(tmp_path, "pose_only")) == "ok"
    asked = needs_for(tmp_path, "pose_only", verify=True)
    assert "sha256" in result_of("weights pose_only", asked).text
    assert state_of("weights pose_only", asked) == "fail"


def test_sets_of_a_mode():
    assert sets_of("scail", None) == ("scail/fp8", "pose/default")
    assert sets_of("steady_dancer", "gguf") == ("steady_dancer/gguf", "pose/default")
    assert sets_of("wan_i2v", "1.3b") == ("wan_i2v/fp8",)  # it has no such preset
    assert sets_of("wan_t2v", "1.3b") == ("wan_t2v/1.3b",)
    assert sets_of("pose_only", "tiny") == ("pose/default",)  # there is no tiny one
    assert sets_of("scail", "tiny") == ()


def test_needs_of_settings(tmp_path):
    def needs(**env: str) -> CheckNeeds:
        return needs_of(read_settings(env), [tmp_path])

    plain = needs()
    assert (plain.any_mode, plain.gpu, plain.memory, plain.attention) == (True, True, "auto", ())
    assert plain.search_dirs == (tmp_path,)
    chosen = needs(XICON_MODES="wan_t2v", XICON_MEMORY="low", XICON_ATTENTION="flash")
    assert (chosen.any_mode, chosen.memory) == (False, "stream")
    assert chosen.attention == ("flash3", "flash2", "flash")
    assert dict(chosen.modes) == {"wan_t2v": ("wan_t2v/fp8",)}
    assert needs(XICON_PRESET="tiny").gpu is False
    assert needs(XICON_VERIFY_WEIGHTS="1").verify
    assert needs(XICON_TMP="/x").tmp == Path("/x")
    assert needs(XICON_DEFAULT_VIDEO="/d.mp4").default_video == Path("/d.mp4")
    assert needs_of(read_settings({}), [], gpu=False).gpu is False
    variant = needs(XICON_STEADY_DANCER_VARIANT="bf16", XICON_MODES="steady_dancer")
    assert variant.modes["steady_dancer"][0] == "steady_dancer/bf16"
