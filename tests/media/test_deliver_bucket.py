"""From variables, or from a request, to one bucket; everything unclear is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.deliver_bucket import bucket_config, public_url, request_bucket
from xicon_infer.settings import default_text, read_settings
from xicon_infer.settings_table import SETTINGS

ACCOUNT = "0123456789abcdef0123456789abcdef"
R2 = f"{ACCOUNT}.r2.cloudflarestorage.com"
KEYS = {"BUCKET_ACCESS_KEY_ID": "own-id", "BUCKET_SECRET_ACCESS_KEY": "own-marked-secret"}
AWS = {"AWS_ACCESS_KEY_ID": "aws-id", "AWS_SECRET_ACCESS_KEY": "aws-marked-secret"}
CLOUDFLARE = {"R2_ACCESS_KEY_ID": "r2-id", "R2_SECRET_ACCESS_KEY": "r2-marked-secret"}


def configured(endpoint, name="", **env):
    return bucket_config(KEYS | {"BUCKET_ENDPOINT_URL": endpoint, "BUCKET_NAME": name} | env)


def refused(endpoint, name="", **env):
    with pytest.raises(InvalidRequest) as caught:
        configured(endpoint, name, **env)
    assert "marked" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("endpoint", "name", "expected"),
    [
        # expected: endpoint, bucket, region, addressing
        ("https://s3.eu-west-3.amazonaws.com", "films", ("", "films", "eu-west-3", "virtual")),
        (
            "https://films.s3.eu-west-3.amazonaws.com",
            "",
            ("https://s3.eu-west-3.amazonaws.com", "films", "eu-west-3", "virtual"),
        ),
        (
            "https://films.s3.eu-west-3.amazonaws.com/",
            "films",
            ("https://s3.eu-west-3.amazonaws.com", "films", "eu-west-3", "virtual"),
        ),
        (
            "https://my.films.s3.amazonaws.com",
            "",
            ("https://s3.amazonaws.com", "my.films", "us-east-1", "path"),
        ),
        (
            "https://films.s3-us-west-2.amazonaws.com",
            "",
            ("https://s3-us-west-2.amazonaws.com", "films", "us-west-2", "virtual"),
        ),
        (f"https://{R2}", "films", ("", "films", "auto", "path")),
        (f"https://{R2}/films", "", (f"https://{R2}", "films", "auto", "path")),
        (f"https://{R2}/films", "films", (f"https://{R2}", "films", "auto", "path")),
        (f"https://films.{R2}", "", (f"https://{R2}", "films", "auto", "path")),
        (f"https://films.{R2}", "films", (f"https://{R2}", "films", "auto", "path")),
        (
            f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com",
            "films",
            ("", "films", "auto", "path"),
        ),
        (
            f"https://films.{ACCOUNT}.eu.r2.cloudflarestorage.com",
            "",
            (f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com", "films", "auto", "path"),
        ),
        (
            "https://films.nyc3.digitaloceanspaces.com",
            "",
            ("https://nyc3.digitaloceanspaces.com", "films", "us-east-1", "path"),
        ),
        ("https://s3.us-west-004.backblazeb2.com", "films", ("", "films", "us-west-004", "path")),
        ("https://s3.fr-par.scw.cloud", "films", ("", "films", "fr-par", "path")),
        ("http://minio:9000", "films", ("", "films", "us-east-1", "path")),
        ("http://minio:9000/films", "", ("http://minio:9000", "films", "us-east-1", "path")),
        ("http://[::1]:9000/films/", "", ("http://[::1]:9000", "films", "us-east-1", "path")),
        (
            "https://films.storage.example.com",
            "films",
            ("https://storage.example.com", "films", "us-east-1", "path"),
        ),
        (
            "https://x.example.com/storage/v1/s3",
            "films",
            ("", "films", "us-east-1", "path"),
        ),
    ],
)
def test_the_bucket_is_found_wherever_people_write_it(endpoint, name, expected):
    config = configured(endpoint, name)
    found = (config.endpoint_url, config.bucket, config.region, config.addressing_style)
    assert found == (expected[0] or endpoint, *expected[1:])


def test_without_an_endpoint_there_is_no_bucket():
    assert bucket_config({}) is None
    assert bucket_config(KEYS | AWS | {"BUCKET_NAME": "films"}) is None


@pytest.mark.parametrize(
    ("endpoint", "name", "text"),
    [
        ("https://s3.eu-west-3.amazonaws.com", "", "names no bucket"),
        (f"https://{R2}", "", "names no bucket"),
        ("http://minio:9000/a/b", "", "several parts"),
        ("https://films.s3.amazonaws.com", "other", "names 'films'"),
        ("https://s3.amazonaws.com", "a b", "must have 3 to 255"),
        ("https://s3.amazonaws.com", "..", "must have 3 to 255"),
        ("minio:9000", "films", "http or https"),
        ("ftp://minio", "films", "http or https"),
        ("https://user:marked@minio", "films", "without a user"),
        ("https://minio?marked=1", "films", "query"),
        ("https://minio:99999", "films", "http or https"),
        ("https://", "films", "http or https"),
    ],
)
def test_what_is_unclear_is_refused(endpoint, name, text):
    assert text in str(refused(endpoint, name))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (KEYS | AWS | CLOUDFLARE, ("own-id", "own-marked-secret", "")),
        (AWS | CLOUDFLARE, ("aws-id", "aws-marked-secret", "")),
        (CLOUDFLARE, ("r2-id", "r2-marked-secret", "")),
        (AWS | {"AWS_SESSION_TOKEN": "token"}, ("aws-id", "aws-marked-secret", "token")),
        (KEYS | {"AWS_SESSION_TOKEN": "token"}, ("own-id", "own-marked-secret", "")),
    ],
)
def test_the_first_family_of_keys_counts(env, expected):
    config = bucket_config(env | {"BUCKET_ENDPOINT_URL": "http://minio/films"})
    assert (config.access_key_id, config.secret_access_key, config.session_token) == expected
    assert "marked" not in repr(config)
    assert expected[0] not in repr(config)


def test_half_a_pair_is_refused():
    endpoint = {"BUCKET_ENDPOINT_URL": "http://minio/films"}
    for env in ({"BUCKET_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, {}):
        with pytest.raises(InvalidRequest):
            bucket_config(env | endpoint)


def test_r2_names_are_read_too():
    env = {"R2_ENDPOINT": f"https://{R2}", "R2_BUCKET": "films"} | CLOUDFLARE
    config = bucket_config(env)
    assert (config.endpoint_url, config.bucket) == (f"https://{R2}", "films")


def test_every_option_counts():
    plain = configured("https://s3.eu-west-3.amazonaws.com", "films")
    for name, value, attribute, expected in (
        ("BUCKET_REGION", "eu-north-1", "region", "eu-north-1"),
        ("AWS_REGION", "eu-north-1", "region", "eu-north-1"),
        ("BUCKET_ADDRESSING_STYLE", "path", "addressing_style", "path"),
        ("BUCKET_PREFIX", "/a/b/", "prefix", "a/b"),
        ("BUCKET_URL_EXPIRES_S", "60", "url_expires_s", 60),
        (
            "BUCKET_PUBLIC_BASE_URL",
            "https://cdn.example/",
            "public_base_url",
            "https://cdn.example",
        ),
        ("BUCKET_ACL", "public-read", "acl", "public-read"),
    ):
        config = configured("https://s3.eu-west-3.amazonaws.com", "films", **{name: value})
        assert getattr(config, attribute) == expected
        assert getattr(plain, attribute) != expected
    assert (plain.part_bytes, plain.threads, plain.attempts) == (16 * 1024**2, 4, 3)
    assert (plain.connect_timeout_s, plain.read_timeout_s) == (10, 60)


def test_wrong_options_are_refused_all_at_once():
    error = refused(
        "ftp://x", "films", BUCKET_PREFIX="a/../b", BUCKET_ACL="all", BUCKET_PUBLIC_BASE_URL="x"
    )
    for name in ("BUCKET_ENDPOINT_URL", "BUCKET_PREFIX", "BUCKET_ACL", "BUCKET_PUBLIC_BASE_URL"):
        assert name in str(error)
    for name, value in (
        ("BUCKET_PREFIX", "a//b"),
        ("BUCKET_PREFIX", "a\\b"),
        ("BUCKET_PREFIX", "x" * 513),
        ("BUCKET_URL_EXPIRES_S", "604801"),
        ("BUCKET_ADDRESSING_STYLE", "dns"),
    ):
        assert name in str(refused("http://minio/films", **{name: value}))


def test_a_public_link_escapes_its_key():
    config = configured("http://minio/films", BUCKET_PUBLIC_BASE_URL="https://cdn.example/x/")
    assert public_url(config, "a b/ü.mp4") == "https://cdn.example/x/a%20b/%C3%BC.mp4"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40),
    st.text("ab.-/", max_size=8),
)
def test_no_endpoint_raises_anything_else(endpoint, name):
    for text in (endpoint, f"https://{endpoint}", f"http://minio/{endpoint}"):
        try:
            config = configured(text, name)
        except InvalidRequest:
            continue
        assert config is None or (config.bucket and "/" not in config.bucket)


S3_CONFIG = {
    "endpointUrl": "https://films.s3.eu-west-3.amazonaws.com",
    "accessId": "their-id",
    "accessSecret": "their-marked-secret",
}


def public(host, timeout_s):
    return ["93.184.216.34"]


def test_a_request_may_bring_its_bucket():
    worker = read_settings({"BUCKET_PREFIX": "films", "BUCKET_URL_EXPIRES_S": "60"})
    config = request_bucket(S3_CONFIG, worker, resolve=public)
    assert (config.endpoint_url, config.bucket) == ("https://s3.eu-west-3.amazonaws.com", "films")
    assert (config.access_key_id, config.secret_access_key) == ("their-id", "their-marked-secret")
    assert (config.prefix, config.url_expires_s) == ("films", 60)
    path = S3_CONFIG | {"endpointUrl": "https://s.example", "bucketName": "other"}
    assert request_bucket(path, worker, resolve=public).bucket == "other"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"endpointUrl": "http://s3.eu-west-3.amazonaws.com/x"}, "URL_SCHEME"),
        ({"endpointUrl": "https://127.0.0.1/films"}, "URL_BLOCKED"),
        ({"endpointUrl": "https://metadata.internal/films"}, "URL_BLOCKED"),
        ({"endpointUrl": "https://s.example:22/films"}, "URL_BLOCKED"),
        ({"endpointUrl": "https://a:b@s.example/films"}, "URL_INVALID"),
        ({"endpointUrl": None}, "INVALID_TYPE"),
        ({"accessId": 7}, "INVALID_TYPE"),
        ({"accessSecret": ""}, "INVALID_TYPE"),
        ({"endpointUrl": "https://s.example"}, "MISSING_FIELD"),
    ],
)
def test_a_bad_bucket_of_a_request_is_refused(changes, code):
    with pytest.raises(InvalidRequest) as caught:
        request_bucket(S3_CONFIG | changes, read_settings({}), resolve=public)
    assert caught.value.code == code
    assert "marked" not in str(caught.value)


def test_a_name_that_leads_to_a_private_address_is_refused():
    def silent(host, timeout_s):
        raise TimeoutError

    for resolve in (lambda h, t: ["93.184.216.34", "10.0.0.1"], lambda h, t: [], silent):
        with pytest.raises(InvalidRequest, match="not allowed"):
            request_bucket(S3_CONFIG, read_settings({}), resolve=resolve)


def test_the_page_on_storage_names_every_variable_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
    table = page.split("## Variables")[1].splitlines()
    rows = {
        cells[1].strip(" `"): (cells[2].strip(), cells[3])
        for line in table
        if len(cells := line.split("|")) == 5 and cells[1].strip().startswith("`")
    }
    wanted = [setting for setting in SETTINGS if setting.group in ("output", "bucket")]
    assert set(rows) == {setting.name for setting in wanted}
    for setting in wanted:
        default, text = rows[setting.name]
        if default_text(setting):
            assert default == f"`{default_text(setting)}`"
        for other in setting.also:
            assert f"`{other}`" in text
