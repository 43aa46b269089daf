"""The step caches of a graph: what the command line gets of them, and what is told instead."""

from __future__ import annotations

import pytest

from tests.workflow_graphs import load, with_input, with_node
from xicon_infer.job import make_job
from xicon_infer.workflow import import_report
from xicon_infer.workflow_cli_command import command, job_values

CASES = {
    "WanVideoTeaCache": ("teacache", {"rel_l1_thresh": 0.2, "start_step": 2, "end_step": 9}),
    "WanVideoMagCache": ("magcache", {"magcache_thresh": 0.2, "start_step": 2, "end_step": 9}),
    "WanVideoEasyCache": ("easycache", {"easycache_thresh": 0.2, "start_step": 2, "end_step": 9}),
}


def with_cache(kind, steps=20, **inputs):
    graph = with_input(load("wan_t2v_api"), 55, "steps", steps)
    graph = with_input(graph, 55, "cache_args", ["90", 0])
    return import_report(with_node(graph, 90, kind, cache_device="offload_device", **inputs))


def caches(imported):
    return {name: value for name, value in imported.options.items() if "cache" in name}


@pytest.mark.parametrize("kind", CASES)
def test_a_cache_becomes_options_of_the_command_line(kind):
    method, inputs = CASES[kind]
    imported = with_cache(kind, **inputs)
    wanted = {
        "step_cache": method,
        "step_cache_threshold": 0.2,
        "step_cache_start": 2,
        "step_cache_end": 9,
    }
    assert caches(imported) == wanted
    assert not any("cache" in text.lower() for text in imported.warnings)
    values = job_values(imported, [])
    job = make_job(values)
    assert {name: getattr(job, name) for name in wanted} == wanted
    assert f"--step-cache={method}" in command(values)


def test_what_a_node_leaves_out_is_its_default():
    assert caches(with_cache("WanVideoTeaCache"))["step_cache_threshold"] == 0.3
    assert caches(with_cache("WanVideoMagCache"))["step_cache_threshold"] == 0.02
    assert caches(with_cache("WanVideoEasyCache"))["step_cache_start"] == 10
    assert caches(with_cache("WanVideoEasyCache", end_step=9999))["step_cache_end"] == -1


def test_caches_that_are_not_used_are_told():
    few = with_cache("WanVideoTeaCache", steps=5)
    assert caches(few) == {}
    assert any("caches need 12 steps" in text for text in few.warnings)
    late = with_cache("WanVideoMagCache", start_step=30)
    assert caches(late) == {}
    assert any("no step is skipped" in text for text in late.warnings)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("WanVideoTeaCache", "mode", "e0"),
        ("WanVideoTeaCache", "use_coefficients", False),
        ("WanVideoMagCache", "magcache_K", 2),
    ],
)
def test_settings_that_no_option_has_are_told(kind, name, value):
    assert any(name in text for text in with_cache(kind, **{name: value}).warnings)
