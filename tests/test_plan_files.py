"""Weight files in a dry run: found, missing, or there with another size than the listed one."""

from __future__ import annotations

from pathlib import Path

from pipelines.plan import make_plan
from pipelines.plan_text import format_plan
from xicon_infer.job import make_job
from xicon_infer.weights.manifest import files_for

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_file_of_another_size_than_the_listed_one_is_not_called_found(tmp_path: Path) -> None:
    job = make_job(
        {
            "image": str(EXAMPLES / "character.png"),
            "track": str(EXAMPLES / "dance_fullbody.npz"),
            "preset": "fp8",
            "output": str(tmp_path / "out.mp4"),
        }
    )
    entry = next(e for e in files_for("scail", "fp8") if e.size_bytes)
    path = tmp_path / entry.names[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    plan = make_plan(job, search_dirs=[tmp_path])
    (file,) = [f for f in plan.files if f.path == path]
    assert (file.damaged, file.listed_bytes) == (True, entry.size_bytes)
    line = next(line for line in format_plan(plan).splitlines() if str(path) in line)
    assert "DAMAGED" in line
    assert "found" not in line
    assert f"5 bytes, {entry.size_bytes:,} are listed" in line
    with path.open("r+b") as sparse:
        sparse.truncate(entry.size_bytes)
    plan = make_plan(job, search_dirs=[tmp_path])
    assert not any(f.damaged for f in plan.files)
    assert f"found    {path}" in format_plan(plan)
