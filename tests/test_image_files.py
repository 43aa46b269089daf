"""The files of the platform: Hub listing and tests, local test, compose, example of settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.dockerfile import SECRET, SECRET_VALUE, instructions
from xicon_infer.request import RequestContext, parse_request
from xicon_infer.settings import env_example, read_settings
from xicon_infer.settings_table import MODES, SETTINGS

ROOT = Path(__file__).parents[1]
HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())
NAMES = {name for setting in SETTINGS for name in (setting.name, *setting.also)}
OF_THE_SDK = {"RUNPOD_INIT_TIMEOUT"}
INPUTS = [item for item in HUB["config"]["env"] if "input" in item]
# runpod/docs: serverless GPU pools, and GPU types.
POOLS = {"AMPERE_16", "AMPERE_24", "ADA_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO"}
POOLS |= {"HOPPER_141"}


def settings_with(pairs: dict[str, object]):
    return read_settings({name: str(value) for name, value in pairs.items() if name in NAMES})


def parsed(event):
    return parse_request(event, read_settings({}), RequestContext(modes=MODES))


# ---- hub.json ------------------------------------------------------------------------------


def test_the_listing_has_what_the_hub_asks_for():
    assert (HUB["type"], HUB["category"]) == ("serverless", "video")
    assert HUB["title"]
    assert HUB["description"]
    config = HUB["config"]
    assert (config["runsOn"], config["gpuCount"]) == ("GPU", 1)
    assert config["containerDiskInGb"] == 30  # the image holds no weights
    assert config["gpuIds"] == "ADA_80_PRO,AMPERE_80,ADA_48_PRO,AMPERE_48,ADA_24"
    assert set(config["gpuIds"].split(",")) <= POOLS
    assert config["allowedCudaVersions"] == ["12.8", "12.9", "13.0"]
    for name in ("handler.py", "Dockerfile", "README.md"):
        assert (ROOT / name).is_file()


def test_the_default_image_runs_on_every_cuda_version_that_is_allowed():
    torch = (ROOT / "docker/torch-default.txt").read_text()
    assert "+cu128\n" in torch
    assert min(HUB["config"]["allowedCudaVersions"]) == "12.8"


def test_every_variable_of_the_listing_is_a_setting():
    keys = [item["key"] for item in HUB["config"]["env"]]
    assert len(keys) == len(set(keys))
    assert set(keys) <= NAMES | OF_THE_SDK
    wanted = {"XICON_MODES", "XICON_MEMORY", "XICON_ATTENTION", "REFRESH_WORKER"}
    wanted |= {"BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"}
    assert wanted <= set(keys)


@pytest.mark.parametrize("item", INPUTS, ids=lambda item: item["key"])
def test_an_input_is_complete_and_its_values_are_accepted(item):
    shown = item["input"]
    assert {"name", "type", "description", "default", "advanced"} <= set(shown)
    if item["key"].startswith("BUCKET_"):
        assert (shown["advanced"], shown["default"]) == (True, "")
    values = [option["value"] for option in shown.get("options", [])]
    if shown["type"] == "boolean":
        values = [shown["trueValue"], shown["falseValue"]]
    else:
        assert shown["type"] == "string"
        assert not values or shown["default"] in values
    for value in values:
        settings_with({item["key"]: value})


def test_options_offer_every_choice():
    choices = {setting.name: set(setting.choices) for setting in SETTINGS}
    for item in INPUTS:
        offered = [option["value"] for option in item["input"].get("options", [])]
        if item["key"] in ("XICON_MEMORY", "XICON_ATTENTION"):
            assert set(offered) == choices[item["key"]]
        if item["key"] == "XICON_MODES":
            assert {mode for value in offered for mode in value.split(",")} == choices[
                "XICON_MODES"
            ]


def test_presets_name_settings_and_modes():
    presets = {preset["name"]: preset["defaults"] for preset in HUB["config"]["presets"]}
    assert set(presets) == {"SCAIL", "SteadyDancer", "Wan"}
    modes = {name: settings_with(defaults).modes for name, defaults in presets.items()}
    assert modes == {
        "SCAIL": ("scail", "pose_only"),
        "SteadyDancer": ("steady_dancer", "pose_only"),
        "Wan": ("wan_i2v", "wan_t2v"),
    }
    offered = {item["key"] for item in INPUTS}
    assert all(set(defaults) <= offered for defaults in presets.values())


# ---- tests.json and test_input.json ---------------------------------------------------------


def test_the_tests_of_the_hub_are_requests():
    assert [test["name"] for test in TESTS["tests"]] == ["health", "dry_run_nested"]
    health, nested = (parsed(test) for test in TESTS["tests"])
    assert (health.form, health.action) == ("action", "health")
    assert (nested.form, nested.resolved["dry_run"]) == ("legacy_nested", True)
    assert (nested.resolved["width"], nested.resolved["seed"]) == (416, 42)
    assert list(nested.warnings) == []
    # Milliseconds.
    assert all(10_000 <= test["timeout"] <= 600_000 for test in TESTS["tests"])


def test_the_local_test_is_a_dry_run_without_a_warning():
    request = parsed(json.loads((ROOT / "test_input.json").read_text()))
    assert (request.id, request.form) == ("local-test", "native")
    assert request.resolved["dry_run"] is True
    assert list(request.warnings) == []


def test_the_machine_of_the_tests():
    config = TESTS["config"]
    # A GPU, not a pool of them.
    assert config["gpuTypeId"] == "NVIDIA GeForce RTX 4090"
    assert config["allowedCudaVersions"] == HUB["config"]["allowedCudaVersions"]
    env = {item["key"]: item["value"] for item in config["env"]}
    assert set(env) <= NAMES | OF_THE_SDK
    settings = settings_with(env)
    assert (settings.preset, settings.modes) == ("tiny", ("scail",))


# ---- compose and settings ------------------------------------------------------------------


def test_compose_offers_the_local_api_to_this_machine_alone():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    (service,) = compose["services"].values()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["command"][:3] == ["python", "-u", "handler.py"]
    assert "--rp_serve_api" in service["command"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    declared = {
        step.text.partition("=")[0]
        for step in instructions((ROOT / "Dockerfile").read_text())
        if step.word == "ARG"
    }
    assert set(service["build"]["args"]) <= declared
    assert set(service["environment"]) <= NAMES


@pytest.mark.parametrize(
    "name", ["docker-compose.yml", ".runpod/hub.json", ".runpod/tests.json", ".env.example"]
)
def test_no_file_holds_a_secret(name):
    text = (ROOT / name).read_text()
    assert not SECRET_VALUE.search(text)
    for line in text.splitlines():
        found = SECRET.search(line)
        value = line.replace('"', "").partition("=")[2] if "=" in line else ""
        assert not (found and value.strip()), line


def test_the_example_of_settings_is_made_from_the_code():
    assert (ROOT / ".env.example").read_text() == env_example()
