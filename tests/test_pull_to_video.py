"""From an empty folder to a loaded pipeline: pulled with broken connections, verified, run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.loading import LoadOptions, load_preset
from tests.every_preset import PIPELINES, write_preset
from tests.pipelines.test_presets import velocity
from tests.weights.hub_server import Fault, digest, serving
from xicon_infer.errors import WeightsError
from xicon_infer.types import SilentProgress
from xicon_infer.weights.download import pull
from xicon_infer.weights.manifest import FileEntry, files_for
from xicon_infer.weights.places import find_all
from xicon_infer.weights.verify import verify_files


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        yield running


def publish(server, entry: FileEntry, path: Path) -> FileEntry:
    """Puts a file on the synthetic hub under its own address; returns its entry, pinned to it."""
    body = path.read_bytes()
    published = server.publish(entry.path, body)
    return replace(
        entry,
        repo=published.repo,
        revision=None,
        size_bytes=len(body),
        sha256=digest(body),
        unverified="",
    )


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_pipeline_runs_on_what_was_pulled(server, tmp_path, pipeline):
    source = write_preset(tmp_path / "source", pipeline, "fp8")
    entries = [publish(server, e, source / e.target) for e in files_for(pipeline, "fp8")]
    folder = tmp_path / "models"
    transformer = next(entry for entry in entries if entry.component == "transformer")
    # The connection breaks in the middle, then the disk holds another file than is listed.
    half = f"/cdn/{transformer.sha256}"
    server.faults[half] = [Fault(close_after=transformer.size_bytes // 2)] * 2
    wrong = replace(entries[-1], sha256="0" * 64)
    with pytest.raises(WeightsError, match=r"not the one listed|sha256"):
        pull([*entries[:-1], wrong], folder, progress=SilentProgress(), transfer=server.transfer())
    pulled = pull(entries, folder, progress=SilentProgress(), transfer=server.transfer())
    assert {one.state for one in pulled} <= {"present", "downloaded", "resumed"}
    assert not list(folder.rglob("*.part"))
    found = find_all(entries, (folder,))
    assert set(found) == {entry.id for entry in entries}
    verdicts = verify_files(list(found.values()), quick=False, progress=SilentProgress())
    assert {v.state for v in verdicts} == {"ok"}, verdicts
    parts = load_preset(pipeline, "fp8", LoadOptions(search_dirs=(folder,)))
    assert all(str(folder) in path for path in parts.sources.values())
    assert velocity(parts).isfinite().all()
