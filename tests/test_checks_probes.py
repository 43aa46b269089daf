"""The real probes, as far as a machine without a GPU can answer them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli_media import write_video
from xicon_infer import checks_probes
from xicon_infer.checks_probes import (
    ONNX_CONV,
    attention_kernels,
    disk_free_bytes,
    fp8_ways,
    gpu_facts,
    multiply,
    onnx_device,
    own_requirements,
    package_version,
    run_nvidia_smi,
    torch_cuda,
    video_facts,
    write_trial,
)
from xicon_infer.errors import BackendUnavailable, MediaError, XiconError


def program(monkeypatch, code: str) -> None:
    monkeypatch.setattr(checks_probes, "_SMI", (sys.executable, "-c", code))


def test_nvidia_smi_answers(monkeypatch):
    program(monkeypatch, "print('H100, 570.1')")
    assert run_nvidia_smi(20.0) == "H100, 570.1\n"


def test_nvidia_smi_fails(monkeypatch):
    program(monkeypatch, "import sys; sys.exit('driver mismatch')")
    with pytest.raises(RuntimeError, match="driver mismatch"):
        run_nvidia_smi(20.0)
    program(monkeypatch, "import sys; sys.exit(9)")
    with pytest.raises(RuntimeError, match="exit code 9"):
        run_nvidia_smi(20.0)


def test_nvidia_smi_hangs_and_is_not_waited_for(monkeypatch):
    program(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        run_nvidia_smi(0.2)


def test_no_nvidia_smi(monkeypatch):
    monkeypatch.setattr(checks_probes, "_SMI", ("no-such-program-here",))
    with pytest.raises(FileNotFoundError):
        run_nvidia_smi(1.0)


def test_no_gpu_here():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(BackendUnavailable, match=r"sees no GPU|without CUDA"):
        gpu_facts()
    assert torch_cuda() == (torch.version.cuda or "")


def test_a_product_on_the_cpu():
    multiply("cpu")


def test_kernels_and_ways_have_reasons():
    assert ("math", "") in attention_kernels()
    assert fp8_ways()["dequant"] == ""


def test_the_small_network_is_the_one_that_onnx_writes():
    onnx = pytest.importorskip("onnx")
    helper, tensor = onnx.helper, onnx.TensorProto
    x = helper.make_tensor_value_info("x", tensor.FLOAT, [1, 1, 3, 3])
    y = helper.make_tensor_value_info("y", tensor.FLOAT, [1, 1, 1, 1])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    assert onnx.load_from_string(ONNX_CONV) == model


def test_onnxruntime_is_run_and_not_only_opened(monkeypatch):
    assert onnx_device("cpu") == ("cpu", "")
    monkeypatch.setattr(checks_probes, "_SUM_OF_SQUARES", 8.0)
    with pytest.raises(RuntimeError, match=r"gave 9\.0 instead of 8\.0"):
        onnx_device("cpu")


def test_onnxruntime_falls_back_with_a_reason(monkeypatch):
    ran = []

    def run(device: str) -> None:
        ran.append(device)
        if device == "cuda":
            raise BackendUnavailable("no kernel image")

    monkeypatch.setattr(checks_probes, "_run_conv", run)
    assert onnx_device("cuda") == ("cpu", "no kernel image")
    assert ran == ["cuda", "cpu"]
    monkeypatch.setattr(checks_probes, "_run_conv", ran.append)
    assert onnx_device("cuda") == ("cuda", "")


def test_a_damaged_network_is_no_answer(monkeypatch):
    monkeypatch.setattr(checks_probes, "ONNX_CONV", ONNX_CONV[:40])
    with pytest.raises(XiconError):
        onnx_device("cpu")


def test_requirements_and_versions():
    lines = own_requirements()
    assert not [line for line in lines if "extra ==" in line]
    assert not lines or any(line.startswith("torch") for line in lines)
    assert package_version("pytest") == pytest.__version__
    assert package_version("no-such-package-here") == ""


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert disk_free_bytes(tmp_path / "a" / "b") > 0


def test_a_trial_file_leaves_nothing(tmp_path):
    folder = tmp_path / "new" / "one"
    write_trial(folder)
    assert list(folder.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OSError):
        write_trial(blocked / "below")


def test_a_video_is_described(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert "h264" in video_facts(path)
    path.write_bytes(b"no video")
    with pytest.raises(MediaError):
        video_facts(path)


@pytest.mark.gpu
def test_the_probes_on_a_gpu():
    facts = gpu_facts()
    assert facts.free_bytes <= facts.total_bytes
    multiply()
    assert onnx_device()[0] == "cuda"
