"""Pulling from the synthetic server, and what is told on the way."""

from __future__ import annotations

import pytest

from tests.weights.hub_server import digest, weights
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.types import SilentProgress
from xicon_infer.weights.download import pull

BODY = weights(1_500_000)


class Told(SilentProgress):
    """Keeps what is told; raises Cancelled as soon as so many megabytes are there."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.steps = []
        self.stages = []
        self.stop_at = stop_at

    def stage(self, name):
        self.stages.append(name)
        return super().stage(name)

    def step(self, done, total, unit="step"):
        self.steps.append((done, total, unit))
        if self.stop_at is not None and done >= self.stop_at:
            raise Cancelled("the user pressed Ctrl-C")


def get(server, entries, folder, *, progress=None, transfer=None, **options):
    transfer = server.transfer(**(transfer or {}))
    return pull(entries, folder, progress=progress or Told(), transfer=transfer, **options)


def refusal(server, entries, folder, **options):
    with pytest.raises(WeightsError) as caught:
        get(server, entries, folder, **options)
    return caught.value


def cdn(body):
    return f"/cdn/{digest(body)}"


def parts(folder):
    return list(folder.rglob("*.part"))
