"""The settings of the worker: every variable counts, faults are told at once, secrets never."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.settings import InvalidSettings, Settings, env_example, read_settings
from xicon_infer.settings_old import OLD_NAMES, translate
from xicon_infer.settings_table import GROUPS, MODES, SETTINGS, Setting

NAMES = {setting.name for setting in SETTINGS}
OF_CONTRACT = """
XICON_MODES XICON_MODELS_DIR XICON_DEFAULT_VIDEO XICON_INPUT_ROOTS XICON_OUTPUT_DIR XICON_TMP
XICON_MAX_PIXELS XICON_MAX_FRAMES XICON_MAX_IMAGE_BYTES XICON_MAX_VIDEO_BYTES
XICON_MAX_VIDEO_SECONDS XICON_MAX_INLINE_BYTES XICON_FETCH_TIMEOUT_S XICON_ALLOWED_PORTS
XICON_URL_ALLOWLIST XICON_REQUIRE_HTTPS XICON_ALLOW_PRIVATE_URLS XICON_ALLOW_REQUEST_S3
XICON_STRICT_INPUT XICON_LEGACY_LENIENT XICON_RESPONSE_FORMAT XICON_JOB_TIMEOUT_S
XICON_CANCEL_GRACE_S XICON_MAX_JOBS XICON_ATTENTION XICON_MEMORY XICON_WARMUP
XICON_VERIFY_WEIGHTS XICON_DOWNLOAD XICON_EMBED_PARAMS XICON_LOG_LEVEL XICON_LOG_PROMPTS
XICON_STEADY_DANCER_VARIANT BUCKET_PREFIX BUCKET_REGION BUCKET_URL_EXPIRES_S
BUCKET_PUBLIC_BASE_URL BUCKET_ADDRESSING_STYLE BUCKET_ACL BUCKET_SKIP_CHECK BUCKET_ENDPOINT_URL
BUCKET_NAME BUCKET_ACCESS_KEY_ID BUCKET_SECRET_ACCESS_KEY AWS_SESSION_TOKEN REFRESH_WORKER
SERVE_API_LOCALLY NETWORK_VOLUME_PATH HF_TOKEN ENABLE_FLASH_ATTN STEADYDANCER_GUIDE_SCALE
STEADYDANCER_CONDITION_GUIDE STEADYDANCER_END_CFG STEADYDANCER_SEED
"""
PAIR = {"BUCKET_ACCESS_KEY_ID": "id", "BUCKET_SECRET_ACCESS_KEY": "hidden"}


def other(setting: Setting) -> str:
    """Returns a value that is not the default."""
    if setting.kind == "flag":
        return "no" if setting.default else "yes"
    if setting.kind in ("integer", "number"):
        return str(int(setting.low) + (setting.low == setting.default))
    if setting.choices:
        return setting.choices[-1].upper()
    return {"list": "a.com", "ports": "9000", "path": "/else", "paths": "/else:/more"}.get(
        setting.kind, "text"
    )


def test_every_variable_of_the_contract_is_there():
    assert set(OF_CONTRACT.split()) <= NAMES
    own = NAMES - set(OF_CONTRACT.split())
    assert own == {
        *("XICON_PRESET", "XICON_MODERATION", "XICON_CACHE_DIR", "XICON_DEBUG", "XICON_KERNELS")
    }


def test_table_and_settings_have_the_same_attributes():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields == {setting.field for setting in SETTINGS} | {"notices"}
    assert len(SETTINGS) == len(NAMES) == len({setting.field for setting in SETTINGS})
    assert {setting.group for setting in SETTINGS} == set(GROUPS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_variable_counts(setting):
    base = dict(PAIR)
    if setting.name == "AWS_SESSION_TOKEN":
        base = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    before = read_settings(base)
    after = read_settings({**base, setting.name: other(setting)})
    assert getattr(before, setting.field) != getattr(after, setting.field)
    for name in setting.also:
        if "KEY" not in name:
            assert getattr(read_settings({**base, name: other(setting)}), setting.field) == getattr(
                after, setting.field
            )
    if "KEY" not in setting.name:
        assert read_settings({**base, setting.name: " "}) == before


def test_defaults():
    found = read_settings({})
    assert found.modes == MODES
    assert (found.max_pixels, found.max_frames) == (1_048_576, 481)
    assert (found.max_image_bytes, found.max_video_bytes) == (30_000_000, 300_000_000)
    assert (found.job_timeout_s, found.cancel_grace_s, found.max_jobs) == (3300, 60, 0)
    assert found.allowed_ports == (80, 443, 8080, 8443)
    assert found.input_roots == (Path("/runpod-volume"),)
    assert found.output_dir == Path("/runpod-volume/outputs")
    assert (found.bucket_url_expires_s, found.bucket_endpoint_url) == (604_800, "")
    assert (found.log_level, found.warmup, found.log_prompts) == ("INFO", True, False)
    assert found.notices == ()


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_switches_on(text):
    assert read_settings({"XICON_DOWNLOAD": text}).download


@pytest.mark.parametrize("text", ["0", "FALSE", "no", "off"])
def test_switches_off(text):
    assert not read_settings({"XICON_WARMUP": text}).warmup


def test_all_faults_are_told_at_once_with_near_names():
    env = {
        "XICON_MAX_PIXEL": "1",
        "XICON_QQQQQQ": "1",
        "XICON_MAX_FRAMES": "many",
        "XICON_MAX_PIXELS": "5",
        "XICON_MODES": "scail,dance",
        "XICON_MEMORY": "huge",
        "XICON_WARMUP": "perhaps",
        "XICON_ALLOWED_PORTS": "80,http",
        "XICON_INPUT_ROOTS": "in",
        "XICON_FETCH_TIMEOUT_S": "nan",
        "BUCKET_ENDPOINT_URL": "https://s3.example.com",
        "R2_ACCESS_KEY_ID": "k",
        "PATH": "/bin",
    }
    with pytest.raises(InvalidSettings) as caught:
        read_settings(env)
    error = caught.value
    assert isinstance(error, InvalidRequest)
    assert error.code == "INVALID_SETTINGS"
    assert list(error.errors) == [
        "Unknown setting XICON_MAX_PIXEL; did you mean XICON_MAX_PIXELS?",
        "Unknown setting XICON_QQQQQQ; unset it",
        "XICON_MODES must be some of scail, steady_dancer, wan_i2v, wan_t2v, pose_only, separated "
        'by commas, got "scail,dance"',
        'XICON_MEMORY must be one of auto, full, balanced, low, got "huge"',
        'XICON_WARMUP must be one of 1, true, yes, on, 0, false, no, off, got "perhaps"',
        'XICON_MAX_PIXELS must be between 16384 and 1048576, got "5"',
        'XICON_MAX_FRAMES must be a whole number between 1 and 481, got "many"',
        'XICON_INPUT_ROOTS must be an absolute path, got "in"',
        'XICON_FETCH_TIMEOUT_S must be a number between 1 and 3600, got "nan"',
        'XICON_ALLOWED_PORTS must be ports from 1 to 65535, separated by commas, got "80,http"',
        "R2_ACCESS_KEY_ID is set but R2_SECRET_ACCESS_KEY is not: set both, or neither",
    ]
    assert error.message == "; ".join(error.errors)


@pytest.mark.parametrize(
    ("env", "key"),
    [
        ({"BUCKET_ACCESS_KEY_ID": "b", "BUCKET_SECRET_ACCESS_KEY": "s"}, ("b", "s", "")),
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}, ("a", "s", "")),
        (
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"},
            ("a", "s", "t"),
        ),
        ({"R2_ACCESS_KEY_ID": "r", "R2_SECRET_ACCESS_KEY": "s"}, ("r", "s", "")),
        (
            {
                **PAIR,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "s",
                "AWS_SESSION_TOKEN": "t",
            },
            ("id", "hidden", ""),
        ),
        ({"AWS_ACCESS_KEY_ID": "a"}, ("", "", "")),
        ({}, ("", "", "")),
    ],
)
def test_keys_come_as_a_pair_of_one_family(env, key):
    found = read_settings(env)
    names = ("bucket_access_key_id", "bucket_secret_access_key", "bucket_session_token")
    assert tuple(getattr(found, name) for name in names) == key


def test_a_bucket_needs_a_pair():
    bucket = {"R2_ENDPOINT": "https://x.r2.cloudflarestorage.com"}
    assert read_settings({**bucket, **PAIR}).bucket_endpoint_url == bucket["R2_ENDPOINT"]
    for env in (bucket, {**bucket, "BUCKET_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}):
        with pytest.raises(InvalidSettings, match="ACCESS_KEY"):
            read_settings(env)


def test_secrets_are_never_shown():
    secrets = {setting.name: "mark-secret" for setting in SETTINGS if setting.secret}
    assert len(secrets) == 4
    found = read_settings({**secrets, "BUCKET_ENDPOINT_URL": "https://u:mark-secret@s3.x.com"})
    assert found.bucket_secret_access_key == "mark-secret"
    assert "mark-secret" not in repr(found)
    assert "mark-secret" not in env_example()


OLD = {
    "COMFY_LOG_LEVEL": ("debug", "log_level", "DEBUG"),
    "DEBUG": ("true", "log_level", "DEBUG"),
    "SAGEATTENTION_ENABLED": ("true", "attention", "sage"),
    "ENABLE_SCAIL": ("false", "modes", MODES[1:]),
    "ENABLE_STEADYDANCER": ("0", "modes", (MODES[0], *MODES[2:])),
    "STEADYDANCER_VARIANT": ("bf16", "steady_dancer_variant", "bf16"),
    "GPU_MEMORY_MODE": ("model_cpu_offload", "memory", "balanced"),
    "MODELS_DIR": ("/m", "models_dir", (Path("/m"),)),
}


@pytest.mark.parametrize("name", OLD)
def test_renamed_variables_are_read_with_a_notice(name):
    text, attribute, value = OLD[name]
    found = read_settings({name: text})
    assert getattr(found, attribute) == value
    assert len(found.notices) == (name != "MODELS_DIR")
    assert all(name in notice for notice in found.notices)


def test_a_new_name_wins_over_an_old_one():
    found = read_settings({"COMFY_LOG_LEVEL": "DEBUG", "XICON_LOG_LEVEL": "error"})
    assert found.log_level == "ERROR"
    assert found.notices == (
        "COMFY_LOG_LEVEL is now XICON_LOG_LEVEL; read as XICON_LOG_LEVEL=DEBUG, but "
        "XICON_LOG_LEVEL is set and wins",
    )
    both = read_settings({"ENABLE_SCAIL": "false", "ENABLE_STEADYDANCER": "false"})
    assert both.modes == ("wan_i2v", "wan_t2v", "pose_only")


def test_dropped_variables_give_a_notice_unless_they_are_somebody_else_s():
    for old in OLD_NAMES:
        name = old.name.replace("*", "X")
        values, notices = translate({name: "7"})
        if old.verdict in ("kept", "not read", "build only"):
            assert (values, notices) == ({}, [])
        if old.verdict == "dropped":
            assert len(notices) == (not old.silent)
    assert translate({"GPU_TIER": "consumer"})[1] == [
        "GPU_TIER has no effect: set XICON_MEMORY instead"
    ]
    assert translate({"DEBUG": "http:*"}) == ({}, [])
    assert translate({"BAKE_TURBO": "1", "BAKE_SCAIL": "1"})[1] == [
        "BAKE_TURBO has no effect any more: profile `fast`"
    ]


def test_the_example_file_describes_the_defaults():
    lines = env_example().splitlines()
    assignments = dict(
        line[1:].split("=", 1)
        for line in lines
        if line[:2].strip("#") and "=" in line and line[1] != " "
    )
    assert set(assignments) == NAMES
    assert read_settings(assignments) == read_settings({})


def test_where_things_lie():
    found = read_settings({"NETWORK_VOLUME_PATH": "/vol/", "BUCKET_PREFIX": "/films/"})
    assert found.input_roots == (Path("/vol"),)
    assert found.output_dir == Path("/vol/outputs")
    assert found.bucket_prefix == "films"
    assert read_settings({"XICON_MODES": "SteadyDancer, t2v"}).modes == ("steady_dancer", "wan_t2v")


def test_largest_answer():
    found = read_settings({})
    assert found.inline_limit("sync-abc") == 19_000_000
    assert found.inline_limit("abc") == 9_500_000
    assert read_settings({"XICON_MAX_INLINE_BYTES": "5"}).inline_limit("sync-abc") == 5


@given(st.dictionaries(st.sampled_from(sorted(NAMES)), st.text(max_size=20), max_size=5))
@trials(max_examples=300, deadline=None, derandomize=True)
def test_no_text_breaks_it(env):
    try:
        read_settings(env)
    except InvalidSettings as error:
        assert error.errors
