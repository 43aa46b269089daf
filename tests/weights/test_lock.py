"""Locking: pins come from what is published, are never changed silently, and never half written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from xicon_infer.errors import WeightsError
from xicon_infer.types import SilentProgress
from xicon_infer.weights.lock import PIN_SOURCE, lock
from xicon_infer.weights.manifest import MANIFEST_NAME, load_manifest

ROOT = Path(__file__).parents[2]
OLD, NEW = "a" * 40, "b" * 40
HASH, OTHER = "1" * 64, "2" * 64


@dataclass(frozen=True)
class Remote:
    """Answers with the same file for every entry and keeps what was asked."""

    revision: str | None = NEW
    size_bytes: int | None = 123
    sha256: str | None = HASH
    refuse: tuple[str, ...] = ()
    asked: list = None

    def __call__(self, entry):
        if self.asked is not None:
            self.asked.append((entry.id, entry.revision))
        if entry.id in self.refuse:
            raise WeightsError(f"{entry.id}: not there")
        return self


@pytest.fixture
def manifest(tmp_path):
    """The project's manifest with the first three files only, nothing pinned."""
    content = json.loads((ROOT / MANIFEST_NAME).read_text())
    content["files"] = content["files"][:3]
    for raw in content["files"]:
        raw.update(bytes=None, sha256=None, revision=None, pin_source="")
    path = tmp_path / "manifest.json"
    write(path, content)
    return path


def write(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    load_manifest.cache_clear()


def read(path):
    return json.loads(path.read_text())["files"]


def pin(path, number, **values):
    content = json.loads(path.read_text())
    content["files"][number].update(pin_source="me", **values)
    write(path, content)


def run(path, remote=None, **options):
    return lock(path, remote=remote or Remote(), progress=SilentProgress(), **options)


def test_it_pins_everything_and_nothing_else_changes(manifest):
    before = json.loads(manifest.read_text())
    pins = run(manifest)
    assert [(p.id, p.changed, p.error) for p in pins] == [
        (raw["id"], True, "") for raw in before["files"]
    ]
    expected = before["files"]
    for raw in expected:
        raw.update(revision=NEW, bytes=123, sha256=HASH, pin_source=PIN_SOURCE)
    assert read(manifest) == expected
    entry = load_manifest(manifest).files[0]
    assert (entry.revision, entry.size_bytes, entry.sha256) == (NEW, 123, HASH)


def test_locking_twice_changes_nothing(manifest):
    run(manifest)
    text = manifest.read_text()
    assert not any(p.changed for p in run(manifest))
    assert manifest.read_text() == text


def test_a_silent_server_changes_nothing_in_the_projects_own_manifest(tmp_path):
    path = tmp_path / "m.json"
    path.write_text((ROOT / MANIFEST_NAME).read_text())
    pins = run(path, Remote(None, None, None))
    assert len(pins) == len(read(path))
    assert path.read_text() == (ROOT / MANIFEST_NAME).read_text()


@pytest.mark.parametrize("name", ["sha256", "bytes"])
def test_a_pinned_value_is_not_changed_silently(manifest, name):
    pin(manifest, 1, **{name: {"sha256": OTHER, "bytes": 7}[name]})
    text = manifest.read_text()
    with pytest.raises(WeightsError, match=f"{name} .* -> .*--update") as caught:
        run(manifest)
    assert read(manifest)[1]["id"] in caught.value.message
    assert manifest.read_text() == text
    pins = run(manifest, update=True)
    assert pins[1].contradicts
    assert read(manifest)[1][name] == {"sha256": HASH, "bytes": 123}[name]


def test_a_pinned_revision_is_asked_for_until_update(manifest):
    pin(manifest, 0, revision=OLD, bytes=123, sha256=HASH)
    for update, revision in ((False, OLD), (True, None)):
        asked = []
        run(manifest, Remote(OLD if not update else NEW, asked=asked), update=update)
        assert asked[0][1] == revision
    assert read(manifest)[0]["revision"] == NEW


def test_what_the_server_does_not_say_is_not_forgotten(manifest):
    pin(manifest, 0, bytes=9, sha256=OTHER)
    run(manifest, Remote(NEW, None, None))
    raw = read(manifest)[0]
    assert (raw["revision"], raw["bytes"], raw["sha256"]) == (NEW, 9, OTHER)
    assert raw["pin_source"] == "me"


def test_one_file_that_cannot_be_asked(manifest):
    name = read(manifest)[1]["id"]
    pins = run(manifest, Remote(refuse=(name,)))
    assert [bool(p.error) for p in pins] == [False, True, False]
    assert [raw["sha256"] for raw in read(manifest)] == [HASH, None, HASH]


def test_some_files_and_another_output(manifest, tmp_path):
    text, asked = manifest.read_text(), []
    names = [raw["id"] for raw in read(manifest)]
    output = tmp_path / "out.json"
    pins = run(manifest, Remote(asked=asked), ids={names[2]}, output=output)
    assert [p.id for p in pins] == [i for i, _ in asked] == [names[2]]
    assert manifest.read_text() == text
    assert [raw["sha256"] for raw in read(output)] == [None, None, HASH]


@pytest.mark.parametrize(
    "remote", [Remote(sha256="xyz"), Remote(size_bytes=-5)], ids=["hash", "size"]
)
def test_nonsense_from_the_server_is_not_written(manifest, remote):
    text = manifest.read_text()
    with pytest.raises(WeightsError, match="entry"):
        run(manifest, remote)
    assert manifest.read_text() == text


def test_a_place_that_cannot_be_written(manifest, tmp_path):
    with pytest.raises(WeightsError, match="--output") as caught:
        run(manifest, output=tmp_path / "no" / "where.json")
    assert caught.value.field == "output"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json"]


def test_progress_counts_files(manifest):
    steps = []

    class Telling(SilentProgress):
        def step(self, done, total, unit="step"):
            steps.append((done, total, unit))

    lock(manifest, remote=Remote(), progress=Telling())
    assert steps == [(1, 3, "file"), (2, 3, "file"), (3, 3, "file")]
