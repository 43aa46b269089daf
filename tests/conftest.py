"""One thread per test process: tiny tensors run faster, and results are the same everywhere.

What the tests themselves are made of is taken out of the garbage collector's sight: a session lets
a pipeline go with a full collection, which would look at 10,000 tests every time.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Hides what was collected from the garbage collector."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives it back: modules that count their objects at the end would report leaks."""
    gc.unfreeze()
