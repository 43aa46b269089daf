"""Opening and running ONNX files: batches, element types, and every way in which it can fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from xicon_infer.errors import BackendUnavailable, InvalidRequest, OutOfMemory, WeightsError
from xicon_infer.pose.onnx_model import open_model

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def write_network(path: Path, batch: int | str | None = "N", *, kind=FLOAT, out_batch=None) -> Path:
    """Writes x [batch, 3] -> (3 x + 1 [batch, 3], place of the largest [batch])."""
    values = [np.array([3.0], np.float32), np.array([1.0], np.float32)]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants = [
        numpy_helper.from_array(v.astype(dtype), name)
        for v, name in zip(values, ("three", "one"), strict=True)
    ]
    nodes = [
        helper.make_node("Mul", ["x", "three"], ["scaled"]),
        helper.make_node("Add", ["scaled", "one"], ["y"]),
        helper.make_node("ArgMax", ["x"], ["largest"], axis=1, keepdims=0),
    ]
    last = batch if out_batch is None else out_batch
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", kind, [batch, 3])],
        [
            helper.make_tensor_value_info("y", kind, [last, 3]),
            helper.make_tensor_value_info("largest", INT64, [last]),
        ],
        constants,
    )
    save(graph, path)
    return path


def save(graph, path: Path, **settings) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, str(path), **settings)


@pytest.mark.parametrize("batch", ["N", None, 1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_batch_gives_the_same(tmp_path, batch, rows):
    model = open_model(write_network(tmp_path / "net.onnx", batch), CPU)
    assert model.batch_size == (batch if isinstance(batch, int) else None)
    x = torch.arange(rows * 3.0).reshape(rows, 3) % 7
    y, largest = model.run(x)
    assert torch.equal(y, 3 * x + 1)
    assert torch.equal(largest, x.argmax(dim=1))


def test_an_output_axis_of_another_name_is_met(tmp_path):
    model = open_model(write_network(tmp_path / "net.onnx", "N", out_batch="found"), CPU)
    assert torch.equal(model.run(torch.ones(4, 3))[0], torch.full((4, 3), 4.0))


def test_half_precision_networks_take_float_tensors(tmp_path):
    model = open_model(write_network(tmp_path / "net.onnx", kind=HALF), CPU)
    y = model.run(torch.ones(2, 3))[0]
    assert y.dtype == torch.float16
    assert torch.equal(y.float(), torch.full((2, 3), 4.0))


def test_a_view_is_read_in_its_own_order(tmp_path):
    model = open_model(write_network(tmp_path / "net.onnx"), CPU)
    x = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(model.run(x)[0], 3 * x + 1)


@pytest.mark.parametrize("shape", [(0, 3), (2, 4), (2, 3, 1)])
def test_batches_of_another_shape_are_refused(tmp_path, shape):
    model = open_model(write_network(tmp_path / "net.onnx"), CPU)
    with pytest.raises(InvalidRequest, match=r"net\.onnx takes \[\?, 3\]"):
        model.run(torch.zeros(shape))


def test_threads_reach_the_session(tmp_path):
    path = write_network(tmp_path / "net.onnx")
    for threads, expected in ((3, 3), (None, torch.get_num_threads())):
        session = open_model(path, CPU, threads=threads).session
        assert session.get_session_options().intra_op_num_threads == expected
    with pytest.raises(InvalidRequest, match="at least 1"):
        open_model(path, CPU, threads=0)


def test_a_network_of_another_kind_is_refused(tmp_path):
    model = open_model(write_network(tmp_path / "net.onnx"), CPU)
    model.require((None, 3), [(None, 5), (None, None)])
    with pytest.raises(WeightsError, match=r"takes \[N, 3\].*\[\?, 4\] and returns \[\?, 3\]"):
        model.require((None, 4), [(None, 3)])
    with pytest.raises(WeightsError, match=r"\[\?, 5\] or \[\?, 3, 1\] is needed") as caught:
        model.require((None, 3), [(None, 5), (None, 3, 1)])
    assert caught.value.code == "MODEL_MISMATCH"


def test_a_missing_file_is_named_with_its_neighbours(tmp_path):
    write_network(tmp_path / "other.onnx")
    with pytest.raises(WeightsError, match=r"absent\.onnx is not there.*other\.onnx"):
        open_model(tmp_path / "absent.onnx", CPU)


def external(folder: Path) -> tuple[Path, Path]:
    """Writes a network whose weights lie in another file, and returns both."""
    weights = numpy_helper.from_array(np.ones((3, 40), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 40])],
        [weights],
    )
    path = folder / "large.onnx"
    save(graph, path, save_as_external_data=True, location="large_data.bin", size_threshold=0)
    return path, folder / "large_data.bin"


def test_weights_beside_the_file_are_found(tmp_path):
    path, _ = external(tmp_path)
    assert torch.equal(open_model(path, CPU).run(torch.ones(2, 3))[0], torch.full((2, 40), 3.0))


def test_missing_weights_beside_the_file_are_named(tmp_path):
    path, data = external(tmp_path)
    data.rename(tmp_path / "renamed.bin")
    with pytest.raises(WeightsError, match=r"weights in large_data\.bin, which must lie"):
        open_model(path, CPU)


def test_weights_given_for_the_network_are_told_apart(tmp_path):
    _, data = external(tmp_path)
    with pytest.raises(WeightsError, match=r"Give the \.onnx file.*large\.onnx"):
        open_model(data, CPU)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, content):
    path = write_network(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(WeightsError, match="Download it again") as caught:
        open_model(path, CPU)
    assert caught.value.code == "MODEL_CORRUPT"


def two_inputs() -> onnx.GraphProto:
    ports = [helper.make_tensor_value_info(n, FLOAT, [1]) for n in ("a", "b", "y")]
    return helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])], "g", ports[:2], ports[2:]
    )


def text_input() -> onnx.GraphProto:
    ports = [helper.make_tensor_value_info(n, TensorProto.BOOL, [1]) for n in ("a", "y")]
    return helper.make_graph([helper.make_node("Not", ["a"], ["y"])], "g", ports[:1], ports[1:])


@pytest.mark.parametrize(("graph", "said"), [(two_inputs, "2 inputs"), (text_input, "the type")])
def test_inputs_of_another_kind_are_refused(tmp_path, graph, said):
    save(graph(), tmp_path / "net.onnx")
    with pytest.raises(WeightsError, match=said):
        open_model(tmp_path / "net.onnx", CPU)


def test_a_device_without_onnx_is_refused(tmp_path):
    with pytest.raises(BackendUnavailable, match="'cuda' or 'cpu'"):
        open_model(write_network(tmp_path / "net.onnx"), torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path):
    with pytest.raises(BackendUnavailable, match="'device' is 'cuda'"):
        open_model(write_network(tmp_path / "net.onnx"), CUDA)


def test_a_missing_runtime_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="pip install onnxruntime"):
        open_model(write_network(tmp_path / "net.onnx"), CPU)


def fake_runtime(providers: list[str], session: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="9.9",
        get_available_providers=lambda: providers,
        SessionOptions=SimpleNamespace,
        InferenceSession=lambda *_, **__: session,
    )


def test_a_runtime_without_cuda_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_runtime(["CPUExecutionProvider"]))
    with pytest.raises(BackendUnavailable, match="no CUDA: pip install onnxruntime-gpu"):
        open_model(write_network(tmp_path / "net.onnx"), CUDA)


def test_a_silent_fall_to_the_cpu_is_refused(tmp_path, monkeypatch):
    import onnxruntime.capi.onnxruntime_pybind11_state  # noqa: F401  must be there beforehand

    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    runtime = fake_runtime(["CUDAExecutionProvider", "CPUExecutionProvider"], session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    with pytest.raises(BackendUnavailable, match=r"would run net\.onnx on CPUExecutionProvider"):
        open_model(write_network(tmp_path / "net.onnx"), CUDA)


@pytest.mark.parametrize(
    ("message", "error"),
    [("Failed to allocate memory for 5 bytes", OutOfMemory), ("CUDNN failure", BackendUnavailable)],
)
def test_failures_while_running_are_sorted(tmp_path, message, error):
    model = open_model(write_network(tmp_path / "net.onnx"), CPU)

    class Failing:
        def io_binding(self):
            return SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)

        def run_with_iobinding(self, binding):
            raise RuntimeError(message)

    model.session = Failing()
    with pytest.raises(error, match=r"net\.onnx"):
        model.run(torch.zeros(1, 3))


@pytest.mark.gpu
def test_the_gpu_gives_the_same(tmp_path):
    x = torch.arange(15.0).reshape(5, 3)
    for batch in ("N", None, 2):
        model = open_model(write_network(tmp_path / f"{batch}.onnx", batch), CUDA)
        y = model.run(x.cuda())[0]
        assert y.device.type == "cuda"
        assert torch.equal(y.cpu(), 3 * x + 1)
