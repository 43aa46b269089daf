"""`benchmarks.swap`: the formula beside the measurement, and a tiny run of the whole script."""

from __future__ import annotations

import json

import pytest

from benchmarks import swap


def test_the_script_runs_and_the_results_are_the_same(tmp_path, capsys):
    swap.main(["--tiny", "--rounds", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "swap_cpu_tiny.json").read_text())
    assert {"machine", "versions", "commit", "command"} <= set(report)
    assert [(row["tokens"], row["swapped"]) for row in report["rows"]] == [
        (48, 1),
        (16, 1),
        (48, 2),
        (16, 2),
    ]
    assert all(row["relative_difference"] == 0.0 for row in report["rows"])
    assert report["copy"]["bytes"] > 0
    assert report["overlaps"] is False
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("swapped", "predicted", "free"),
    [(10, 4.0, True), (20, 4.0, True), (40, 8.0, False)],
)
def test_the_formula(swapped, predicted, free):
    """40 blocks of 0.1 s; a copy of 0.2 s is hidden behind the computing of two blocks."""
    found = swap.compared(4.0, swapped, 0.2, 4.0, 40)
    assert found["predicted_s"] == pytest.approx(predicted)
    assert found["predicted_free"] == free
    assert found["measured_over_predicted"] == pytest.approx(4.0 / predicted, abs=1e-4)


def test_free_is_what_was_measured_not_what_was_predicted():
    assert swap.compared(4.05, 10, 0.2, 4.0, 40)["free"]
    slow = swap.compared(5.0, 10, 0.2, 4.0, 40)
    assert (slow["predicted_free"], slow["free"], slow["slowdown"]) == (True, False, 1.25)
