"""Tensors of safetensors files, read by several threads: at the speed of the disk.

Bytes go as they are, fp8 too, to one of three places:

- "mapped", on the CPU: threads have the kernel bring the file into memory and into the page table;
  tensors are views of it. Nothing is copied, and memory that runs short gives the pages back
  instead of failing.
- "copied", on the CPU: threads read straight into memory of huge pages. For files that will change
  or go away.
- CUDA: threads read into a ring of pinned memory; one copy stream sends each read straight to its
  place on the device (`xicon_infer.weights.reader_ring`). Unverified on a GPU.

Why mapped is the default: `benchmarks/results/load_cpu.json`, 2 GB, 2 cores that other programs
used too, medians in GB/s with every page read afterwards, over 1, 4 and 8 threads. Warm: mapped
7.0 to 8.6, the same reads thrown away 3.8 to 6.8, copied 1.0 to 3.5, safetensors' own 4.6 to 6.1.
Cold: mapped 1.3 to 1.5, thrown away 1.0 to 1.7, copied 0.2 to 0.8, safetensors' own 0.9 to 1.1.
With 1, 4 and 8 threads mapped is 0.87, 1.11 and 1.30 of the thrown-away read cold, and 2.06, 1.27
and 1.52 warm; it is at least 0.748 of the fastest plain read with any number of threads. What
copying costs is fresh memory, not the read: plain reads that keep their bytes are as slow, and warm
at half that speed or less in pages of 4 KiB. Threads are for disks that need several requests at
once; this one is as fast with one.

Every tensor of 4 MiB or more has memory of its own, smaller ones share 64 MiB
(`xicon_infer.weights.reader_extents`): in few large buffers, one tensor that is kept would keep
1 GB. On the CPU that is one system call for each. PyTorch's CUDA allocator rounds large tensors up
to 2 MiB: by that rule 1 MiB is lost on each 25 MiB weight of Wan 14B.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.types import Progress
from xicon_infer.weights.checkpoint import BLOCK_DTYPE, Checkpoint, read_tensors
from xicon_infer.weights.reader_extents import (
    Extent,
    Piece,
    extent_bytes,
    plan_extents,
    plan_memory,
)
from xicon_infer.weights.reader_memory import bring_in, fill_slabs, host_slab, host_tensor, map_file
from xicon_infer.weights.reader_ring import SLOT_BYTES, CudaDevice, make_ring
from xicon_infer.weights.reader_threads import share_out
from xicon_infer.weights.safetensors_file import read_safetensors_header

Host = Literal["mapped", "copied"]
Identity = tuple[int, int, int, int]

HOST_READ_BYTES = 16 * 2**20
"""Read at once into host memory. On CUDA it is the size of a slot."""

_MB = 1_000_000


class _Source(NamedTuple):
    """One open file. names: of the wanted tensors in it that have bytes, in the file's order."""

    path: Path
    fd: int
    identity: Identity
    names: list[str]


class _Target(NamedTuple):
    """Where the bytes go.

    places: tensor -> slab and offset. take: reads an extent of a source. tensor: makes a tensor
    when all is read. finish: waits for copies under way.
    """

    places: Mapping[str, tuple[int, int]]
    take: Callable[[_Source, Extent], None]
    tensor: Callable[[str], Tensor]
    finish: Callable[[], None]


@torch.inference_mode(mode=False)  # the weights outlive the caller's mode
def stream_tensors(
    checkpoint: Checkpoint,
    names: Collection[str] | None = None,
    *,
    device: torch.device,
    threads: int = 8,
    progress: Progress | None = None,
    host: Host = "mapped",
    dtype: torch.dtype = BLOCK_DTYPE,
) -> dict[str, Tensor]:
    """Returns tensors by name, as stored, on a device; the files are read when it returns.

    What is not safetensors (`.pth`, GGUF) is left to `read_tensors` and moved to the device.

    Args:
        checkpoint: from `open_checkpoint`.
        names: which; None for all. Bytes of other tensors are not read, but for small gaps.
        device: cuda: through pinned memory. cpu: see `host`. Others: by way of the host.
        threads: that read, at least 1.
        progress: told the megabytes read; stops the reading by raising, within one read of each
            thread.
        host: how tensors lie on the CPU. "mapped" brings the file into memory and gives views of
            it, which take no memory of their own; the file must then not be changed in place while
            they are used (a download that replaces it is safe). "copied" puts them into memory of
            their own.
        dtype: what the blocks of a GGUF file become, as for `read_tensors`.

    Raises:
        WeightsError: a name is not in the file; a file cannot be read, ends early, or changed
            since it was opened.
        OutOfMemory: the host has no memory left. PyTorch's own error on the device.
    """
    if checkpoint.format != "safetensors":
        found = read_tensors(checkpoint, names, dtype=dtype)
        return {name: tensor.to(device) for name, tensor in found.items()}
    if device.type not in ("cpu", "cuda"):
        found = stream_tensors(
            checkpoint, names, device=torch.device("cpu"), threads=threads, progress=progress
        )
        return {name: tensor.to(device) for name, tensor in found.items()}
    wanted = list(checkpoint.shapes if names is None else dict.fromkeys(names))
    unknown = sorted(name for name in wanted if name not in checkpoint.shapes)
    if unknown:
        raise WeightsError(f"{checkpoint.path}: holds no tensor {', '.join(unknown[:8])}")
    sizes = {name: _num_bytes(checkpoint, name) for name in wanted}
    largest = SLOT_BYTES if device.type == "cuda" else HOST_READ_BYTES
    size = extent_bytes(sum(sizes.values()), max(threads, 1), largest)
    with ExitStack() as stack:
        sources = _open_sources(stack, checkpoint, sizes)
        if device.type == "cuda":
            target = _on_cuda(checkpoint, sources, sizes, device=device, slot_bytes=size)
        elif host == "mapped":
            target = _mapped(checkpoint, sources)
        else:
            target = _copied(checkpoint, sources, sizes)
        tasks = [
            (source, extent)
            for source in sources
            for extent in plan_extents(_pieces(source, target, checkpoint, sizes), size)
        ]
        try:
            _read(tasks, target, threads=threads, progress=progress)
        finally:  # memory must not go back to the allocator while copies into it are under way
            target.finish()
        for source in sources:
            _check_unchanged(source, os.fstat(source.fd))
    return {
        name: target.tensor(name) if sizes[name] else _empty(checkpoint, name, device)
        for name in wanted
    }


def _read(
    tasks: Sequence[tuple[_Source, Extent]],
    target: _Target,
    *,
    threads: int,
    progress: Progress | None,
) -> None:
    """Reads everything; turns what goes wrong with a file into a WeightsError that names it."""
    total = sum(extent.end - extent.start for _, extent in tasks)
    done = 0

    def work(task: tuple[_Source, Extent]) -> int:
        source, extent = task
        try:
            target.take(source, extent)
        except (OSError, EOFError) as error:
            _check_unchanged(source, os.fstat(source.fd))
            raise WeightsError(f"{source.path}: cannot be read: {error}") from error
        return extent.end - extent.start

    def after(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress.step(done // _MB, max(1, total // _MB), "MB")

    share_out(tasks, work, threads=threads, after=after)


def _copied(
    checkpoint: Checkpoint, sources: Sequence[_Source], sizes: Mapping[str, int]
) -> _Target:
    layout = plan_memory({name: sizes[name] for source in sources for name in source.names})
    slabs = [host_slab(size) for size in layout.slabs]
    fill = fill_slabs(slabs)

    def tensor(name: str) -> Tensor:
        slab, offset = layout.places[name]
        return host_tensor(slabs[slab], offset, checkpoint.dtypes[name], checkpoint.shapes[name])

    return _Target(
        layout.places, lambda source, extent: fill(source.fd, extent), tensor, lambda: None
    )


def _mapped(checkpoint: Checkpoint, sources: Sequence[_Source]) -> _Target:
    mappings = {source.path: _map(source) for source in sources}
    readers = {path: bring_in(mapping) for path, mapping in mappings.items()}

    def tensor(name: str) -> Tensor:
        return host_tensor(
            mappings[checkpoint.files[name]],
            checkpoint.offsets[name],
            checkpoint.dtypes[name],
            checkpoint.shapes[name],
        )

    return _Target(
        {name: (0, checkpoint.offsets[name]) for source in sources for name in source.names},
        lambda source, extent: readers[source.path](source.fd, extent),
        tensor,
        lambda: None,
    )


def _map(source: _Source) -> mmap:
    try:
        return map_file(source.fd)
    except OSError as error:
        raise WeightsError(f"{source.path}: cannot be mapped: {error}") from error


def _on_cuda(
    checkpoint: Checkpoint,
    sources: Sequence[_Source],
    sizes: Mapping[str, int],
    *,
    device: torch.device,
    slot_bytes: int,
) -> _Target:
    layout = plan_memory({name: sizes[name] for source in sources for name in source.names})
    slabs = [device_slab(size, device) for size in layout.slabs]
    cuda = CudaDevice(device, slabs, slot_bytes)
    ring = make_ring(cuda)

    def tensor(name: str) -> Tensor:
        slab, offset = layout.places[name]
        return device_tensor(slabs[slab], offset, checkpoint.dtypes[name], checkpoint.shapes[name])

    return _Target(
        layout.places, lambda source, extent: ring(source.fd, extent), tensor, cuda.finish
    )


def device_slab(size: int, device: torch.device) -> Tensor:
    """Returns fresh memory on a device, uint8 [bytes]."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def device_tensor(slab: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor in a slab, which it keeps alive.

    Args:
        slab: uint8 [bytes].
        offset: of the first byte, a multiple of the dtype's size.
        dtype: as stored.
        shape: as stored.
    """
    empty = torch.empty(0, dtype=dtype, device=slab.device)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    # Not a slice: that would be a view of the slab to autograd, with one version for all tensors.
    return empty.set_(slab.untyped_storage(), offset // dtype.itemsize, shape, strides)


def _pieces(
    source: _Source, target: _Target, checkpoint: Checkpoint, sizes: Mapping[str, int]
) -> list[Piece]:
    starts = ((name, checkpoint.offsets[name]) for name in source.names)
    return [Piece(start, start + sizes[name], *target.places[name]) for name, start in starts]


def _open_sources(
    stack: ExitStack, checkpoint: Checkpoint, sizes: Mapping[str, int]
) -> list[_Source]:
    """Returns the files that hold the wanted tensors, open until the stack is closed."""
    by_file: dict[Path, list[str]] = {}
    for name, size in sizes.items():
        if size:
            by_file.setdefault(checkpoint.files[name], []).append(name)
    sources = []
    for path, names in sorted(by_file.items()):
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error}") from error
        stack.callback(os.close, fd)
        names.sort(key=checkpoint.offsets.__getitem__)
        source = _Source(path, fd, _identity(os.fstat(fd)), names)
        _check_header(checkpoint, source)
        sources.append(source)
    return sources


def _check_header(checkpoint: Checkpoint, source: _Source) -> None:
    """Refuses a file that is not the one that was opened as a checkpoint."""
    try:
        header = read_safetensors_header(source.path)
        _check_unchanged(source, source.path.stat())
    except OSError as error:
        raise WeightsError(f"{source.path}: cannot be read: {error}") from error
    kept = (checkpoint.shapes, checkpoint.dtypes, checkpoint.offsets)
    found = (header.shapes, header.dtypes, header.offsets)
    for name in source.names:
        if [part.get(name) for part in found] != [part[name] for part in kept]:
            raise WeightsError(_changed(source.path))


def _check_unchanged(source: _Source, now: os.stat_result) -> None:
    if _identity(now) != source.identity:
        raise WeightsError(_changed(source.path))


def _changed(path: Path) -> str:
    return f"{path}: changed while it was read. Load it again when nothing writes to it."


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _num_bytes(checkpoint: Checkpoint, name: str) -> int:
    return prod(checkpoint.shapes[name]) * checkpoint.dtypes[name].itemsize


def _empty(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    return torch.empty(checkpoint.shapes[name], dtype=checkpoint.dtypes[name], device=device)
