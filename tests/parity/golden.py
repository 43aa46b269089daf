"""Reading golden files, and measuring how far a result is from them.

A golden is a file made by running a reference implementation: `.safetensors` (with JSON in its
metadata), `.npz` or `.json`. Sizes and options are always read from the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from tests.parity.target import Module, Target


@dataclass(frozen=True)
class Check:
    """One comparison: `rel_err` must not exceed `tolerance`.

    skip is a reason when the file could not be replayed; an unseen kind of file is a skip.
    """

    name: str
    rel_err: float
    tolerance: float
    skip: str = ""

    @property
    def ok(self) -> bool:
        """True if the error is a number within the tolerance."""
        return not self.skip and self.rel_err <= self.tolerance


class Golden:
    """One golden file, loaded when its content is first asked for.

    Args:
        path: of the file.
        roots: folders in which other files of the same set are looked for.
        target: where networks run and tensors are; None for float32 on the CPU.
    """

    def __init__(self, path: Path, roots: list[Path], target: Target | None = None) -> None:
        self.path = path
        self.roots = roots
        self.target = target
        self.kind = path.suffix.lstrip(".")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Returns the metadata of a safetensors file, JSON values parsed."""
        if self.kind != "safetensors":
            return {}
        with safe_open(self.path, "pt") as file:
            raw = file.metadata() or {}
        return {key: _parse(value) for key, value in raw.items()}

    @cached_property
    def keys(self) -> set[str]:
        """Returns the names of the tensors or arrays."""
        if self.kind == "safetensors":
            with safe_open(self.path, "pt") as file:
                return set(file.keys())
        if self.kind == "npz":
            return set(np.load(self.path).files)
        return set()

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns every tensor of a safetensors file."""
        device = "cpu" if self.target is None else str(self.target.device)
        with safe_open(self.path, "pt", device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    @cached_property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Returns every array of an npz file."""
        with np.load(self.path) as file:
            return {key: file[key] for key in file.files}

    @cached_property
    def json(self) -> Any:
        """Returns the content of a JSON file."""
        return json.loads(self.path.read_text())

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns the tensors whose names start with `prefix`, the prefix removed."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def sibling(self, stem: str) -> Golden:
        """Returns the golden with that file stem: in the same folder, else below any root."""
        beside = sorted(self.path.parent.glob(f"{stem}.safetensors"))
        found = beside or [p for root in self.roots for p in sorted(root.rglob(f"{stem}.*"))]
        if not found:
            raise FileNotFoundError(
                f"{self.path.name} needs {stem}.safetensors, which is not there"
            )
        return Golden(found[0], self.roots, self.target)

    def place(self, model: Module) -> Module:
        """Returns a model with its weights loaded, where and as it is to run."""
        return model if self.target is None else self.target.place(model)

    def plain(self) -> Golden:
        """Returns the same file for float32 on the CPU."""
        return self if self.target is None else Golden(self.path, self.roots)


Replay = Callable[[Golden], "list[Check] | None"]
"""Returns the checks of a file, or None if the file is of another kind."""


def rel_max(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns max |a - e| / max |e| (inf if the shapes differ)."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.cpu(), expected.cpu()
    difference = (actual.double() - expected.double()).abs().max().item()
    return float(difference / max(expected.double().abs().max().item(), 1e-30))


def rel_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ||a - e|| / ||e|| (inf if the shapes differ)."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.cpu(), expected.cpu()
    difference = (actual.double() - expected.double()).norm().item()
    return float(difference / max(expected.double().norm().item(), 1e-30))


def abs_max(actual: Any, expected: Any) -> float:
    """Returns max |a - e| of two lists, arrays or tensors (inf if the shapes differ)."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape:
        return float("inf")
    return float(np.abs(a - e).max()) if a.size else 0.0


def exact(actual: Any, expected: Any) -> float:
    """Returns 0 if the two are equal (tensors: shape and every element), else inf."""
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        same = actual.shape == expected.shape and bool(torch.equal(actual.cpu(), expected.cpu()))
    else:
        same = bool(actual == expected)
    return 0.0 if same else float("inf")


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
