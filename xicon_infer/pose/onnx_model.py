"""Opening and running an ONNX network with one input, on torch tensors.

A network that was asked for on the GPU runs there or raises: onnxruntime on its own would go on
silently on the CPU, a hundred times slower. Tensors are bound by address in both directions, so on
a GPU nothing passes through the host. onnxruntime is imported when a file is opened.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xicon_infer.errors import (
    BackendUnavailable,
    InvalidRequest,
    OutOfMemory,
    WeightsError,
    XiconError,
)

Shape = tuple[int | None, ...]
"""Sizes of the axes; None is any size."""

# Names that onnxruntime gives element types, for those that pose networks use.
_DTYPES: dict[str, tuple[torch.dtype, Any]] = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(int64)": (torch.int64, np.int64),
    "tensor(int32)": (torch.int32, np.int32),
}
# An entry ("location", file name) of the protobuf of an ONNX file, its length in one byte.
_LOCATION = re.compile(rb"\n\x08location\x12([\x01-\x7f])", re.DOTALL)
_INSTALL_GPU = "pip install onnxruntime-gpu"


@dataclass(frozen=True)
class Port:
    """One input or output of a network.

    shape: an int where the size is fixed, else the name of the axis (or None).
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype
    element_type: Any


class OnnxModel:
    """A network in memory; `open_model` makes it. Dropping it frees its memory.

    Args:
        session: an onnxruntime session.
        path: the file, for messages.
        device: where it runs; results lie there.

    Raises:
        WeightsError: if there is not exactly one input, or an element type is unknown.
    """

    def __init__(self, session: Any, path: Path, device: torch.device) -> None:
        inputs = session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(node.name for node in inputs)
            raise WeightsError(
                f"{path} has {len(inputs)} inputs ({names}); a network with one input is needed.",
                code="MODEL_MISMATCH",
            )
        self.session = session
        self.path = path
        self.device = device
        self.input = _port(inputs[0], path)
        self.outputs = tuple(_port(node, path) for node in session.get_outputs())

    @property
    def batch_size(self) -> int | None:
        """Returns the batch that the file was exported for, or None if it takes any."""
        first = self.input.shape[0] if self.input.shape else None
        return first if isinstance(first, int) and first > 0 else None

    def require(self, input_shape: Shape, output_shapes: Sequence[Shape]) -> None:
        """Refuses a network of another kind, as far as its file states its shapes.

        Args:
            input_shape: of the input.
            output_shapes: the first output must have one of these.

        Raises:
            WeightsError: if a stated size differs; the message says what is expected.
        """
        output = self.outputs[0]
        if _fits(self.input.shape, input_shape) and any(
            _fits(output.shape, shape) for shape in output_shapes
        ):
            return
        wanted = " or ".join(map(_written, output_shapes))
        raise WeightsError(
            f"{self.path} takes {_written(self.input.shape)} and returns "
            f"{_written(output.shape)}; a network that takes {_written(input_shape)} and returns "
            f"{wanted} is needed. Choose another file.",
            code="MODEL_MISMATCH",
        )

    def run(self, batch: Tensor) -> list[Tensor]:
        """Returns every output of the network, along the same batch axis.

        A file with a fixed batch is run in pieces of that size, the last one filled up.

        Args:
            batch: [N, ...], N >= 1; converted to the device and element type of the network.

        Raises:
            InvalidRequest: if the batch is empty or does not fit the input.
            OutOfMemory: if the device memory does not suffice.
            BackendUnavailable: if onnxruntime fails otherwise.
        """
        expected = (None, *self.input.shape[1:])
        if not len(batch) or not _fits(tuple(batch.shape), _fixed_only(expected)):
            raise InvalidRequest(
                f"batch has the shape {_written(tuple(batch.shape))}; {self.path.name} takes "
                f"{_written(expected)} with at least one row.",
                field="batch",
            )
        batch = batch.to(self.device, self.input.dtype).contiguous()
        if self.batch_size is None:
            return self._run(batch)
        size = self.batch_size
        pieces = [self._run_piece(piece, size) for piece in torch.split(batch, size)]
        return [torch.cat(column) for column in zip(*pieces, strict=True)]

    def _run_piece(self, piece: Tensor, size: int) -> list[Tensor]:
        """Returns the outputs of at most `size` rows."""
        filling = piece[-1:].expand(size - len(piece), *piece.shape[1:])
        outputs = self._run(torch.cat([piece, filling]) if len(filling) else piece)
        return [output[: len(piece)] for output in outputs]

    def _run(self, batch: Tensor) -> list[Tensor]:
        """Returns the outputs of one call of the session."""
        binding = self.session.io_binding()
        place = (self.device.type, _index(self.device))
        binding.bind_input(
            self.input.name, *place, self.input.element_type, tuple(batch.shape), batch.data_ptr()
        )
        results = [self._empty(port, len(batch)) for port in self.outputs]
        for port, result in zip(self.outputs, results, strict=True):
            if result is None:
                binding.bind_output(port.name)  # onnxruntime allocates, on the host
            else:
                shape, address = tuple(result.shape), result.data_ptr()
                binding.bind_output(port.name, *place, port.element_type, shape, address)
        if self.device.type == "cuda":
            # onnxruntime runs on its own stream: what torch has queued must be there first.
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except _ort_errors() as error:
            raise _run_error(self.path, error) from error
        values = binding.get_outputs()
        return [
            torch.from_numpy(value.numpy()).to(self.device) if result is None else result
            for result, value in zip(results, values, strict=True)
        ]

    def _empty(self, port: Port, rows: int) -> Tensor | None:
        """Returns room for an output, or None if its size is known only after the run."""
        first, *rest = port.shape or (None,)
        same_axis = first == rows or (isinstance(first, str) and first == self.input.shape[0])
        if not same_axis or not all(isinstance(size, int) and size > 0 for size in rest):
            return None
        sizes = [int(size) for size in rest if isinstance(size, int)]
        return torch.empty((rows, *sizes), dtype=port.dtype, device=self.device)


def open_model(path: Path, device: torch.device, *, threads: int | None = None) -> OnnxModel:
    """Returns a network ready to run.

    Args:
        path: the `.onnx` file; weights kept beside it are found by the names it holds.
        device: cuda or cpu.
        threads: of one operator on the CPU, at least 1; as many as torch uses if None.

    Raises:
        BackendUnavailable: if onnxruntime is missing, or the device is cuda and the network
            cannot run there.
        InvalidRequest: if `threads` is below 1.
        WeightsError: if the file, or the file of its weights, is missing or cannot be read.
    """
    if threads is not None and threads < 1:
        raise InvalidRequest(f"threads is {threads}; at least 1 is needed.", field="threads")
    if not path.is_file():
        raise WeightsError(f"The ONNX file {path} is not there.{_onnx_files_near(path)}")
    runtime = _runtime(device)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # failures are raised here, in words
    try:
        session = runtime.InferenceSession(
            str(path), options, providers=_providers(device), enable_fallback=0
        )
    except _ort_errors() as error:
        raise _open_error(path, error) from error
    active = session.get_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" not in active:
        raise BackendUnavailable(
            f"'device' is 'cuda' but onnxruntime {runtime.__version__} would run {path.name} on "
            f"{', '.join(active)}: its CUDA libraries do not load. Install the CUDA and cuDNN "
            f"versions it needs ({_INSTALL_GPU}[cuda,cudnn]), or use device 'cpu'.",
            field="device",
        )
    return OnnxModel(session, path, device)


def _runtime(device: torch.device) -> Any:
    """Returns the onnxruntime module, able to reach the device as far as it says itself."""
    if device.type not in ("cuda", "cpu"):
        raise BackendUnavailable(
            f"device is {device.type!r}; ONNX files run on 'cuda' or 'cpu'.", field="device"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime is not installed; it runs the ONNX files: {_INSTALL_GPU}, or "
            "pip install onnxruntime for the CPU alone."
        ) from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in (
        onnxruntime.get_available_providers()
    ):
        raise BackendUnavailable(
            f"'device' is 'cuda' but the installed onnxruntime has no CUDA: {_INSTALL_GPU}, or "
            "use device 'cpu'.",
            field="device",
        )
    return onnxruntime


def _providers(device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    settings = {
        "device_id": _index(device),
        # The default tries every convolution algorithm at every new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles its pool each time; the transformer needs that memory later.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def _ort_errors() -> tuple[type[Exception], ...]:
    """Returns what onnxruntime raises; its exceptions have no common root."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (getattr(state, name) for name in dir(state))
    own = tuple(e for e in found if isinstance(e, type) and issubclass(e, Exception))
    return (*own, RuntimeError, ValueError)


def _open_error(path: Path, error: Exception) -> XiconError:
    """Returns the reason why a file that exists could not be opened."""
    if re.search("CUDA|CUDNN|CUBLAS|allocate memory", str(error), re.IGNORECASE):
        return _run_error(path, error)
    absent = [name for name in _external_files(path) if not (path.parent / name).is_file()]
    if absent:
        return WeightsError(
            f"{path} keeps its weights in {', '.join(absent)}, which must lie in the same folder "
            f"under that name: {path.parent}. Download it, or undo its renaming."
        )
    if path.suffix.lower() != ".onnx":
        return WeightsError(
            f"{path} is not an ONNX file; it looks like the weights of one. Give the .onnx file "
            f"and keep this one beside it.{_onnx_files_near(path)}",
            code="MODEL_CORRUPT",
        )
    return WeightsError(
        f"{path} cannot be read as an ONNX file ({error}). Download it again; a Git LFS pointer "
        "or a cut download looks like this.",
        code="MODEL_CORRUPT",
    )


def _external_files(path: Path) -> list[str]:
    """Returns the file names in which an ONNX file says that its weights are kept."""
    if not path.stat().st_size:
        return []
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        found = {data[m.end() : m.end() + m[1][0]] for m in _LOCATION.finditer(data)}
    return sorted(name.decode(errors="replace") for name in found)


def _run_error(path: Path, error: Exception) -> XiconError:
    if "allocate memory" in str(error) or "out of memory" in str(error):
        return OutOfMemory(
            f"The device has no memory left for {path.name}; use a smaller chunk. ({error})"
        )
    return BackendUnavailable(f"onnxruntime failed to run {path.name}: {error}")


def _onnx_files_near(path: Path) -> str:
    """Returns a hint that names the ONNX files of the folder, or nothing."""
    near = sorted(p.name for p in path.parent.glob("*.onnx") if p != path)
    return f" In that folder: {', '.join(near)}." if near else ""


def _port(node: Any, path: Path) -> Port:
    if node.type not in _DTYPES:
        raise WeightsError(
            f"{path}: {node.name} has the type {node.type}; known are {', '.join(_DTYPES)}.",
            code="MODEL_MISMATCH",
        )
    return Port(node.name, tuple(node.shape), *_DTYPES[node.type])


def _fits(shape: Sequence[int | str | None], expected: Shape) -> bool:
    """Returns True if no fixed size of `shape` contradicts `expected`."""
    return len(shape) == len(expected) and all(
        wanted is None or not isinstance(size, int) or size == wanted
        for size, wanted in zip(shape, expected, strict=True)
    )


def _fixed_only(shape: Sequence[int | str | None]) -> Shape:
    return tuple(size if isinstance(size, int) else None for size in shape)


def _written(shape: Sequence[int | str | None]) -> str:
    """Returns a shape for a message: `[N, 3, 640, 640]`, any size written as `?`."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _index(device: torch.device) -> int:
    return device.index or 0
