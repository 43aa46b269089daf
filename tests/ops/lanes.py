"""Devices that do not exist: queues that run in any order the events allow, and a clock."""

from __future__ import annotations

import random
from collections import deque

import torch


class QueueLanes:
    """Two queues on the CPU. `run` executes them in a random order that respects the events.

    obey: False ignores every wait, to show that the events matter.
    """

    def __init__(self, seed=0, *, obey=True):
        self.random = random.Random(seed)
        self.obey = obey
        self.queues = {"copy": deque(), "compute": deque()}
        self.done = set()  # recordings that happened
        self.latest = {}  # event -> its last recording
        self.allocations = self.copies = self.recordings = 0
        self.pinned = []

    def empty(self, size):
        self.allocations += 1
        return torch.full((size,), 255, dtype=torch.uint8)

    def pin(self, host):
        self.pinned.append(host.data_ptr())
        return True

    def unpin(self, host):
        self.pinned.remove(host.data_ptr())

    def copy(self, target, source):
        self.copies += 1
        self.queues["copy"].append(("run", lambda: target.copy_(source)))

    def compute(self, work):
        self.queues["compute"].append(("run", work))

    def event(self):
        return object()

    def record(self, event, lane):
        self.recordings += 1
        self.latest[event] = self.recordings
        self.queues[lane].append(("record", self.recordings))

    def wait(self, event, lane):
        if event in self.latest and self.obey:
            self.queues[lane].append(("wait", self.latest[event]))

    def finish(self):
        self.run()

    def run(self):
        while any(self.queues.values()):
            ready = [lane for lane, queue in self.queues.items() if queue and self._ready(queue[0])]
            assert ready, "the events wait for each other"
            kind, value = self.queues[self.random.choice(ready)].popleft()
            if kind == "run":
                value()
            elif kind == "record":
                self.done.add(value)

    def _ready(self, entry):
        return entry[0] != "wait" or entry[1] in self.done


class ClockLanes:
    """A device that only keeps time: a copy takes `copy_s`, and `compute` whatever it is told.

    stalls: how long computing waited, each time that it did.
    """

    def __init__(self, copy_s):
        self.copy_s = copy_s
        self.now = {"copy": 0.0, "compute": 0.0}
        self.at = {}
        self.stalls = []

    def empty(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def pin(self, host):
        return True

    def unpin(self, host):
        pass

    def copy(self, target, source):
        self.now["copy"] += self.copy_s

    def compute(self, seconds):
        self.now["compute"] += seconds

    def event(self):
        return object()

    def record(self, event, lane):
        self.at[event] = self.now[lane]

    def wait(self, event, lane):
        late = self.at.get(event, 0.0) - self.now[lane]
        if late > 1e-9:
            self.now[lane] += late
            if lane == "compute":
                self.stalls.append(late)

    def finish(self):
        pass
