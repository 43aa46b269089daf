"""What may be in the log, what the numbers look like, which answers are kept."""

from __future__ import annotations

import base64
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.fakes import Clock
from xicon_infer.worker_keep import KEPT_S, MAX_ANSWERS, MAX_BYTES, KeptAnswers
from xicon_infer.worker_log import Bridge, JsonLog, prompt_fields, safe_text
from xicon_infer.worker_metrics import SERIES, Metrics


def logged(*, level="INFO", secrets=(), **fields) -> dict:
    written: list[str] = []
    log = JsonLog(written.append, secrets=secrets, now=lambda: 0.0)
    log.event("x", level=level, request_id="r", **fields)
    (line,) = written
    assert "\n" not in line
    return json.loads(line)


def test_a_line_has_the_keys_of_the_platform():
    line = logged(stage="vae", seconds=1.5)
    assert line == {
        "ts": "1970-01-01T00:00:00.000+00:00",
        "level": "INFO",
        "event": "x",
        "requestId": "r",
        "stage": "vae",
        "seconds": 1.5,
    }


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("https://h.example/a.png?X-Sig=abc&t=1", "https://h.example/a.png", "abc"),
        ("https://h.example/a.png#tok", "https://h.example/a.png", "tok"),
        ("https://user:pw@h.example/a", "h.example/a", "pw"),
        ("https://user:pw@h.example/a?x=y1", "h.example/a", "y1"),
        ("data:image/png;base64," + "QUJD" * 9, "data:...", "QUJD"),
        (base64.b64encode(bytes(300)).decode(), "characters>", "AAAA"),
        ("x" * 90 + " " + "y z " * 99, "...", "y z " * 60),
    ],
)
def test_what_must_not_be_logged_is_not(text, kept, gone):
    line = json.dumps(logged(message=text, nested={"a": [text]}))
    assert kept in line
    assert gone not in line


def test_secrets_are_hidden_wherever_they_stand():
    line = json.dumps(
        logged(secrets=["tops3cret", ""], message="a tops3cret b", d={"k": "tops3cret"})
    )
    assert "tops3cret" not in line
    assert line.count("***") == 2


def test_a_client_cannot_begin_a_line_of_its_own():
    line = logged(message='x"\n{"event": "forged"}\r\n')
    assert line["event"] == "x"


@given(st.text(max_size=2000))
def test_any_text_is_cut_and_stays_json(text):
    assert len(safe_text(text)) <= 256
    logged(message=text)


def test_a_giant_text_costs_no_time():
    assert len(safe_text("http://a?" * 10**7)) <= 256


def test_levels_are_obeyed():
    written: list[str] = []
    log = JsonLog(written.append, level="WARNING")
    for level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        log.event("x", level=level)
    assert len(written) == 2


def test_a_prompt_is_hidden_unless_it_may_be_shown():
    hidden = prompt_fields("a dancer", shown=False)
    assert hidden["prompt_characters"] == 8
    assert "dancer" not in json.dumps(hidden)
    assert prompt_fields("a dancer", shown=True)["prompt"] == "a dancer"
    assert prompt_fields("other", shown=False)["prompt_sha256"] != hidden["prompt_sha256"]


def test_numbers_become_prometheus_text():
    metrics = Metrics(Clock())
    metrics.add("xicon_jobs_total", mode="scail", outcome="success")
    metrics.add("xicon_jobs_total", 2, outcome="success", mode="scail")
    metrics.add("xicon_errors_total", code='a"\\\n')
    metrics.put("xicon_job_running", 1)
    metrics.put("xicon_job_running", 0)
    text = metrics.prometheus_text()
    assert '\nxicon_jobs_total{mode="scail",outcome="success"} 3\n' in text
    assert 'xicon_errors_total{code="a\\"\\\\\\n"} 1\n' in text
    assert "# TYPE xicon_jobs_total counter" in text
    assert "\nxicon_job_running 0\n" in text
    assert text.endswith("\n")
    assert metrics.get("xicon_jobs_total", mode="scail") == 3
    assert metrics.get("xicon_jobs_total", mode="other") == 0


def test_a_series_must_be_described():
    with pytest.raises(ValueError, match="SERIES"):
        Metrics().add("xicon_new_total")
    assert all(kind in ("counter", "gauge") and text for kind, text in SERIES.values())


def test_uptime_counts():
    clock = Clock()
    metrics = Metrics(clock)
    clock.now += 5
    assert metrics.numbers()["xicon_uptime_seconds"] == 5


def test_kept_answers_are_bounded_in_number_size_and_time():
    clock = Clock()
    kept = KeptAnswers(clock)
    for number in range(MAX_ANSWERS + 5):
        kept.keep({"id": str(number), "input": {}}, {"n": number})
    assert len(kept) == MAX_ANSWERS
    assert kept.find({"id": "0", "input": {}}) is None
    assert kept.find({"id": "9", "input": {}}) == {"n": 9}
    kept.keep({"id": "big", "input": {}}, {"n": "x" * (MAX_BYTES // 2)})
    kept.keep({"id": "big2", "input": {}}, {"n": "x" * (MAX_BYTES // 2)})
    assert kept.bytes <= MAX_BYTES
    assert kept.find({"id": "big2", "input": {}})
    kept.keep({"id": "huge", "input": {}}, {"n": "x" * MAX_BYTES})
    assert kept.find({"id": "huge", "input": {}}) is None
    clock.now += KEPT_S + 1
    assert kept.find({"id": "big2", "input": {}}) is None


def test_failures_and_jobs_without_a_name_are_not_kept():
    kept = KeptAnswers()
    kept.keep({"id": "a", "input": {}}, {"error": "x"})
    kept.keep({"input": {}}, {"n": 1})
    assert len(kept) == 0


def test_what_the_package_logs_goes_the_same_way():
    written: list[str] = []
    logger = logging.Logger("xicon_infer.somewhere")
    logger.addHandler(Bridge(JsonLog(written.append)))
    logger.warning("UPLOAD: %s", "https://h/a?sig=abc")
    logger.critical("end")
    first, second = map(json.loads, written)
    assert (first["event"], first["level"]) == ("log", "WARNING")
    assert first["message"] == "UPLOAD: https://h/a"
    assert second["level"] == "ERROR"
