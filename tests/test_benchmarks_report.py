"""The page of the benchmarks: up to date, complete, and honest about what is owed."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.report_figures import FIGURES, Figure, state_of, value_of
from benchmarks.report_svg import bars

MARKS = "# t\n<!-- report: owed -->\nof yesterday\n<!-- end: owed -->\nkept\n"
MARKS += "<!-- report: results -->\n<!-- end: results -->\nend\n"
WHERE = {"commit": "abc", "versions": {"torch": "2.11"}}
ON_H100 = WHERE | {"machine": {"device": "NVIDIA H100 80GB HBM3", "cpu": "some"}}


def job(seconds, **more):
    return ON_H100 | {
        "total": {"median_s": seconds},
        "stages": {"sample": {"seconds": seconds, "allocated_bytes": 10**9}},
        "shape": {"pipeline": "scail"},
        "says": ["a <saved> motion"],
        **more,
    }


def test_the_page_is_up_to_date():
    files = report.rendered(report.read_results(report.RESULTS), report.PAGE)
    stale = [path.name for path, text in files.items() if path.read_text() != text]
    assert stale == [], "run python -m benchmarks.report"


@pytest.mark.parametrize("missing", report.REQUIRED)
def test_a_result_that_does_not_say_where_it_was_made_is_refused(tmp_path, missing):
    content = {key: value for key, value in ON_H100.items() if key != missing}
    (tmp_path / "good.json").write_text(json.dumps(ON_H100))
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(report.Incomplete, match=f"^bad.json has no {missing}"):
        report.read_results(tmp_path)


def test_writing_twice_changes_nothing_and_keeps_the_rest(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(MARKS)
    (tmp_path / "results").mkdir()
    results = {"job_scail-81_cuda.json": job(13.0)}
    for _ in range(2):
        files = report.rendered(results, page)
        for path, text in files.items():
            path.write_text(text)
    assert report.rendered(results, page) == files
    text = page.read_text()
    assert "of yesterday" not in text
    assert "kept" in text
    assert text.endswith("end\n")
    assert "| 13 | met: good | [job_scail-81_cuda.json]" in text
    assert f"{len(FIGURES) - 1} of {len(FIGURES)} figures are owed." in text
    assert (tmp_path / "results" / "job_scail-81_cuda.svg") in files


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"README.md needs the lines <!-- report: owed -->"):
        report.rendered({}, page)


@pytest.mark.parametrize(
    ("value", "more", "expected"),
    [
        (None, False, "owed"),
        (0.5, False, "met: ambitious"),
        (1.0, False, "met: ambitious"),
        (1.5, False, "met: good"),
        (2.5, False, "met: must"),
        (9.0, False, "missed"),
        (0.5, True, "missed"),
        (9.0, True, "met: ambitious"),
    ],
)
def test_states(value, more, expected):
    targets = (3.0, 2.0, 1.0) if not more else (1.0, 2.0, 3.0)
    figure = Figure("it", "s", ("it",), lambda content: None, "it", *targets, more=more)
    assert state_of(figure, value) == expected


def test_a_figure_without_targets_is_measured():
    figure = Figure("it", "s", ("it",), lambda content: None, "it")
    assert state_of(figure, 1.0) == "measured"


def test_figures_are_found_in_results_of_the_right_card():
    forward = {
        "B0": {"median_s": 5.0},
        "B1": {"median_s": 3.0},
        "O1": {"median_s": 3.0, "speed_up": 1.67, "times_the_floor": 1.2,
               "share_of_the_floor": 0.83},
        "O3": {"median_s": 2.0, "speed_up": 2.5, "times_the_floor": 1.15,
               "share_of_the_floor": 0.87},
    }  # fmt: skip
    dit = ON_H100 | {
        "results": {"32760": forward},
        "errors": {"O3": {"relative_l2": 0.03}},
        "breakdown": {"O3": {"share": {"gaps": 0.01}}},
    }
    results = {"dit_cuda_40layers_whole.json": dit, "parity_bf16.json": ON_H100 | {
        "counts": {"ok": 3, "FAIL": 0}}}  # fmt: skip
    found = {figure.what: value_of(figure, results)[0] for figure in FIGURES}
    assert found["pass of 480x832x81, bf16"] == 3.0
    assert found["same over diffusers as it comes, best mode"] == 2.5
    assert found["same over diffusers with its best flags, best mode"] == 1.5
    assert found["share of the floor of the run, best mode"] == 0.87
    assert found["error against float32, fp8 products"] == 0.03
    assert found["time of a block in which nothing runs"] == 0.01
    assert found["golden files that fail in bf16"] == 0
    assert found["warm job 416x672x81, 6 steps"] is None
    elsewhere = {"dit_cuda_40layers.json": dit | {"machine": {"device": "NVIDIA A10"}}}
    assert {value_of(figure, elsewhere)[0] for figure in FIGURES} == {None}


def test_the_start_is_read_where_the_whole_was_computed():
    start = {"early-reading": {"whole": {"ready_s": 9.0}}, "first-ever": {"whole": None}}
    results = {"cold_start_cuda.json": ON_H100 | {"starts": start}}
    figure = FIGURES[-1]
    assert value_of(figure, results) == (9.0, "cold_start_cuda.json")
    assert state_of(figure, 9.0) == "met: good"


def test_a_chart_is_a_picture_with_every_bar():
    rows = [("ours & theirs", 2.0), ("<it>", 4.0)]
    root = ElementTree.fromstring(bars("seconds", rows, "s", mark=3.0))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names == ["seconds", "ours & theirs", "2 s", "<it>", "4 s"]
    widths = [float(r.get("width")) for r in root.iter("{http://www.w3.org/2000/svg}rect")
              if r.get("x")]  # fmt: skip
    assert widths[1] == 2 * widths[0]
