"""What the encoders made of a text, a picture or a video, kept by content.

A driving video that animates ten characters is encoded once, and so is its prompt. Entries lie on
the host; the least recently used ones go first when there are too many bytes.

The key is a hash of the bytes that go in and of every option that changes what comes out. A cache
belongs to one set of encoders: `pipelines.components.Components` holds it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from torch import Tensor

MAX_BYTES = 512 * 2**20
"""Of all entries; the pose of 81 frames at 512 x 896 takes 2.4 MB, a long prompt 4 MB."""


class ConditionCache:
    """Tensors by content.

    Args:
        max_bytes: of all entries; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self._entries: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of all entries."""
        return sum(entry.nbytes for entry in self._entries.values())

    def get(self, key: str) -> Tensor | None:
        """Returns an entry, on the host, or None."""
        if key not in self._entries:
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str, value: Tensor) -> None:
        """Keeps a copy of a tensor on the host, unless it alone is too large."""
        if value.nbytes > self.max_bytes:
            return
        # Cloned on the CPU too: an entry must not change with its first user, nor keep more alive.
        self._entries[key] = value.detach().to("cpu", copy=True)
        self._entries.move_to_end(key)
        while self.size_bytes > self.max_bytes:
            self._entries.popitem(last=False)

    def recall(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Returns the entry of a key; makes and keeps it if it is not there."""
        kept = self.get(key)
        if kept is None:
            kept = make()
            self.put(key, kept)
        return kept

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()


def content_key(kind: str, *parts: object) -> str:
    """Returns the key of an encoding.

    Args:
        kind: what is encoded, as "text".
        parts: what goes in: arrays by shape, dtype and bytes, anything else by its repr.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=20)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"|{part.dtype}{part.shape}|".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            # Surrogates cannot be hashed as UTF-8; a prompt never has them, a path may.
            digest.update(f"|{part!r}|".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
