"""Blocks that wait in host memory and come to the device just before they are used.

`BlockSwap` holds the bytes of the swapped blocks in page-locked host memory, and on the device two
fixed buffers that they take turns in. While one block computes, the next is copied on a second
stream; events make each wait for the other where it must, and nothing is allocated in between.
Weights are only read, so nothing is ever copied back. `placed` is the simple form: tensors go to
the device for a while and are afterwards what they were, without a copy back either.

A parameter stays the same object all the time; only its storage changes. Do not change weights (or
LoRAs) while they are attached: what is written to a device copy is lost.

Blocks are used one at a time. What a device must be able to do stands in `xicon_infer.ops.lanes`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xicon_infer.errors import InvalidRequest
from xicon_infer.ops.lanes import Lanes, lanes_of
from xicon_infer.ops.packing import Place, end, layout, own_pages
from xicon_infer.ops.placing import (
    KV_NORMS,
    bring,
    layer_of,
    outside,
    placed,
    point,
    put_back,
    tensors_of,
)

_LOG = logging.getLogger(__name__)


@dataclass
class _Packed:
    """One swapped block: its tensors, their bytes on the host, and where they lie."""

    tensors: list[Tensor]
    host: Tensor
    places: list[Place]
    homes: list[Tensor]

    def unchanged(self, tensors: list[Tensor]) -> bool:
        """Returns whether these are the packed tensors, still where they were packed."""
        return len(tensors) == len(self.tensors) and all(
            new is old and new.data_ptr() == home.data_ptr() and new.dtype == home.dtype
            for new, old, home in zip(tensors, self.tensors, self.homes, strict=True)
        )


@dataclass
class _Slot:
    """A device buffer. holds: the swapped block in it. busy: it is being computed with."""

    buffer: Tensor
    filled: Any
    free: Any
    holds: int | None = None
    busy: bool = False


@dataclass
class _Attached:
    """What exists while blocks are attached. homes: tensors that stay, with their host storage."""

    slots: list[_Slot]
    homes: list[tuple[Tensor, Tensor]]
    hooks: list[Any] = field(default_factory=list)


class BlockSwap:
    """Runs blocks of which some wait on the host.

    Build it once; `attach` and `detach` as often as needed. The swapped blocks are spread evenly.
    It copies their weights into host memory of its own and lets go of the old ones, so the host
    needs no second copy. Blocks that changed since are packed again by the next `attach`.

    Args:
        blocks: called in this order, again and again; their tensors lie on the host.
        swapped: how many come and go, 0 to all. Up to `buffers` of them save nothing.
        device: where they compute.
        buffers: device buffers, each as large as the largest swapped block; 2 or more.
        aside: layers of a block, by name, that stay where they are (`KV_PROJECTIONS`).
        pinned: lock the host memory; without it copies hold up the program.
        lanes: for tests; those of the device if None.

    Raises:
        InvalidRequest: swapped or buffers is out of range.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        swapped: int,
        device: torch.device,
        *,
        buffers: int = 2,
        aside: Sequence[str] = (),
        pinned: bool = True,
        lanes: Lanes | None = None,
    ) -> None:
        if not 0 <= swapped <= len(blocks):
            raise InvalidRequest(
                f"'blocks_to_swap' must be 0 to {len(blocks)}, got {swapped}",
                field="blocks_to_swap",
            )
        if buffers < 2:
            raise InvalidRequest(f"a block swap needs 2 buffers or more, got {buffers}")
        self.blocks = list(blocks)
        self.device = device
        self.buffers = min(buffers, swapped)
        self.aside = tuple(aside)
        self.pinned = pinned
        self.lanes = lanes or lanes_of(device)
        self.order = spread(swapped, len(self.blocks))
        self._number = {index: number for number, index in enumerate(self.order)}
        self._packed: dict[int, _Packed] = {}
        self._attached: _Attached | None = None
        self._locked: list[Tensor] = []
        # Memory must not be freed while it is locked. Not at exit: the driver may be gone by then.
        weakref.finalize(self, _unlock, self.lanes, self._locked).atexit = False

    @property
    def host_bytes(self) -> int:
        """Returns the bytes of packed host memory; 0 before the first `attach`."""
        return sum(packed.host.nbytes for packed in self._packed.values())

    def attach(self, *, hooks: bool = True) -> None:
        """Brings the blocks that stay to the device and starts copying the first swapped ones.

        Args:
            hooks: have every block ask for itself when it is called. Without, the caller enters
                `block(i)`; use that for blocks compiled as a whole graph.
        """
        if self._attached is not None:
            return
        try:
            self._attach()
        except BaseException:  # the device may be full: give back what it took
            self.detach()
            raise
        if hooks:
            self._hook()

    def _attach(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for number in range(len(self.order)):
                self._pack(number)
            size = max((packed.host.nbytes for packed in self._packed.values()), default=0)
            slots = [
                _Slot(self.lanes.empty(size), self.lanes.event(), self.lanes.event())
                for _ in range(self.buffers)
            ]
            self._attached = attached = _Attached(slots, [])
            for index, block in enumerate(self.blocks):
                if index not in self._number:
                    attached.homes += bring(self._tensors(block), self.device)
        for slot in slots:  # the memory may still be read by work queued before
            self.lanes.record(slot.free, "compute")
        self._fill(range(self.buffers))

    def detach(self) -> None:
        """Gives the device memory back; every tensor is again the one on the host."""
        attached, self._attached = self._attached, None
        if attached is None:
            return
        for hook in attached.hooks:
            hook.remove()
        self.lanes.finish()
        put_back(attached.homes)
        for packed in self._packed.values():
            point(packed.tensors, packed.homes)

    @contextmanager
    def attached(self, *, hooks: bool = True) -> Iterator[BlockSwap]:
        """Has the blocks attached inside, whatever happens there."""
        try:
            self.attach(hooks=hooks)
            yield self
        finally:
            self.detach()

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Has the tensors of a block on the device inside. Blocks that stay cost nothing."""
        self._enter(index)
        try:
            yield
        finally:
            self._leave(index)

    def close(self) -> None:
        """Detaches and unlocks the host memory; the blocks stay usable on the host."""
        self.detach()
        _unlock(self.lanes, self._locked)
        self._packed.clear()

    def _enter(self, index: int) -> None:
        number = self._number.get(index)
        if number is None or self._attached is None:
            return
        if self._slot_of(number) is None:  # out of turn, as after a pass that was broken off
            self._fill(number + ahead for ahead in range(self.buffers))
        place = self._slot_of(number)
        assert place is not None
        slot = self._attached.slots[place]
        self.lanes.wait(slot.filled, "compute")
        slot.busy = True
        packed = self._packed[number]
        point(packed.tensors, [where.view(slot.buffer) for where in packed.places])

    def _leave(self, index: int) -> None:
        number = self._number.get(index)
        if number is None or self._attached is None:
            return
        place = self._slot_of(number)
        assert place is not None
        slot = self._attached.slots[place]
        self.lanes.record(slot.free, "compute")
        slot.busy = False
        # What is read out of turn is then refused or right, but never the weights of another block.
        point(self._packed[number].tensors, self._packed[number].homes)
        self._fill(number + ahead for ahead in range(1, self.buffers + 1))

    def _fill(self, numbers: Iterable[int]) -> None:
        """Queues copies of these swapped blocks, where they are not there, into other slots."""
        assert self._attached is not None
        wanted = list(dict.fromkeys(number % len(self.order) for number in numbers))
        slots = self._attached.slots
        missing = [number for number in wanted if self._slot_of(number) is None]
        spare = [slot for slot in slots if not slot.busy and slot.holds not in wanted]
        for number, slot in zip(missing, spare, strict=False):
            host = self._packed[number].host
            self.lanes.wait(slot.free, "copy")
            self.lanes.copy(slot.buffer[: host.nbytes], host)
            self.lanes.record(slot.filled, "copy")
            slot.holds = number

    def _slot_of(self, number: int) -> int | None:
        assert self._attached is not None
        found = (i for i, slot in enumerate(self._attached.slots) if slot.holds == number)
        return next(found, None)

    def _hook(self) -> None:
        assert self._attached is not None
        for index in self.order:
            block = self.blocks[index]

            def before(*_: object, index: int = index) -> None:
                self._enter(index)

            def after(*_: object, index: int = index) -> None:
                self._leave(index)

            self._attached.hooks.append(block.register_forward_pre_hook(before))
            self._attached.hooks.append(block.register_forward_hook(after, always_call=True))

    def _tensors(self, block: nn.Module) -> list[Tensor]:
        left = {id(t) for name in self.aside for t in tensors_of(layer_of(block, name))}
        return [tensor for tensor in tensors_of(block) if id(tensor) not in left]

    def _pack(self, number: int) -> None:
        """Packs a block, unless it is packed already and did not change."""
        tensors = self._tensors(self.blocks[self.order[number]])
        old = self._packed.get(number)
        if old is not None and old.unchanged(tensors):
            return
        # An old packing is never written to: an undo copy of a LoRA may be a view of it.
        places = layout(tensors)
        host = own_pages(end(places))
        homes = [place.view(host) for place in places]
        for home, tensor in zip(homes, tensors, strict=True):
            home.copy_(tensor)
        point(tensors, homes)
        if old is not None:
            self._unlock(old.host)
        if self.pinned:
            self._lock(host)
        self._packed[number] = _Packed(tensors, host, places, homes)

    def _lock(self, host: Tensor) -> None:
        if self.lanes.pin(host):
            self._locked.append(host)
        else:
            self.pinned = False
            _LOG.warning("block swap: the host memory cannot be locked; copies will be slow")

    def _unlock(self, host: Tensor) -> None:
        kept = [locked for locked in self._locked if locked is not host]
        if len(kept) < len(self._locked):
            self.lanes.unpin(host)
            self._locked[:] = kept


@contextmanager
def streaming(model: nn.Module, swap: BlockSwap, *, hooks: bool = True) -> Iterator[BlockSwap]:
    """Has a model ready on the device inside: what is outside its blocks, and the swap.

    Args:
        model: holds the blocks of the swap.
        swap: of its blocks.
        hooks: as `BlockSwap.attach`.
    """
    with placed(outside(model, swap.blocks), swap.device), swap.attached(hooks=hooks):
        yield swap


@contextmanager
def projecting(
    model: nn.Module, blocks: Sequence[nn.Module], swap: BlockSwap
) -> Iterator[BlockSwap]:
    """Has what makes keys and values of a conditioning ready on the device inside, no block.

    Args:
        model: a Wan transformer.
        blocks: its blocks.
        swap: of `kv_layers(blocks)`, all swapped.
    """
    norms = [
        tensor
        for block in blocks
        for name in KV_NORMS
        for tensor in tensors_of(layer_of(block, name))
    ]
    with placed([*outside(model, blocks), *norms], swap.device), swap.attached():
        yield swap


def spread(swapped: int, blocks: int) -> list[int]:
    """Returns the indices of the swapped blocks, spread evenly over all.

    Args:
        swapped: s, how many.
        blocks: n, of how many.
    """
    return [((2 * number + 1) * blocks) // (2 * swapped) for number in range(swapped)]


def _unlock(lanes: Lanes, locked: list[Tensor]) -> None:
    while locked:
        lanes.unpin(locked.pop())
