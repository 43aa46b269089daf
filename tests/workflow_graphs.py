"""The small graphs of tests/workflows, and ways to change them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "workflows"
NAMES = ("scail", "steady_dancer", "wan_i2v", "flf2v", "wan_t2v")
FILES = ("knight.png", "dance.mp4", "end.png")
LORA = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"


def load(name):
    """Returns a graph of tests/workflows."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def with_input(graph, node, name, value):
    """Returns the graph with one input of one node changed."""
    changed = copy.deepcopy(graph)
    changed[str(node)]["inputs"][name] = value
    return changed


def with_node(graph, node, kind, **inputs):
    """Returns the graph with one more node."""
    return {**copy.deepcopy(graph), str(node): {"class_type": kind, "inputs": inputs}}


def renamed(graph, order):
    """Returns the graph with other ids, its nodes in the given order."""
    names = {old: f"n{place}" for place, old in enumerate(order)}

    def moved(value):
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in names:
            return [names[str(value[0])], value[1]]
        return value

    return {
        names[old]: {
            "class_type": graph[old]["class_type"],
            "inputs": {key: moved(one) for key, one in graph[old]["inputs"].items()},
        }
        for old in order
    }
