"""The folder of a job: private, always removed, and found again after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.media.fetching import PNG
from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_folder import clean_leftovers, job_folder
from xicon_infer.media.fetch_network import REAL
from xicon_infer.media.fetch_sink import Intake, Sink, Tally
from xicon_infer.media.fetch_types import FetchLimits

ROOT = Path(__file__).parents[2]


def test_a_folder_of_ones_own(tmp_path):
    old = os.umask(0)
    try:
        with job_folder(tmp_path / "new" / "root") as first, job_folder(first.parent) as second:
            assert first != second
            assert first.stat().st_mode & 0o777 == 0o700
            assert first.parent == tmp_path / "new" / "root"
            assert clean_leftovers(first.parent) == 0
            assert first.is_dir()
    finally:
        os.umask(old)
    assert list((tmp_path / "new" / "root").iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_removed_with_everything_in_it(tmp_path, error):
    with pytest.raises(error), job_folder(tmp_path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "image.png").write_bytes(PNG)
        (folder / "link").symlink_to(tmp_path)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from xicon_infer.media.fetch_folder import job_folder\n"
        "with job_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'image.png').write_bytes(b'secret')\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        folder = Path(process.stdout.readline().strip())
        assert clean_leftovers(tmp_path) == 0
        assert (folder / "image.png").is_file()
        process.send_signal(signal.SIGKILL)
    assert (folder / "image.png").is_file()
    assert clean_leftovers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "xicon-job-link").symlink_to(kept)
    (tmp_path / "other").mkdir()
    (tmp_path / "xicon-job-unlocked").mkdir()
    assert clean_leftovers(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "other", "xicon-job-link"]
    assert (kept / "file").exists()
    assert clean_leftovers(tmp_path / "missing") == 0


def test_a_disk_that_fills_up_while_writing(tmp_path):
    limits = FetchLimits()
    tally = Tally(tmp_path, limits, REAL)
    intake = Intake("image", "image", limits, REAL, threading.Event(), tally, REAL.now() + 60)
    with Path("/dev/full").open("wb", buffering=0) as file:
        sink = Sink(file, tmp_path / "a", intake)
        with pytest.raises(MediaError) as caught:
            sink.write(PNG)
    assert caught.value.code == "DISK_FULL"
    assert str(tmp_path) not in caught.value.message
