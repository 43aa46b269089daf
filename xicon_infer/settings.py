"""The settings of the worker, from environment variables.

The environment itself is read in `xicon_infer.runtime`; here a mapping becomes `Settings`, with
every fault reported at once. The table of variables is `xicon_infer.settings_table`, that of
names of older workers `xicon_infer.settings_old`.
"""

from __future__ import annotations

import difflib
import json
import math
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.settings_old import FALSE, OLD_NAMES, TRUE, translate
from xicon_infer.settings_table import GROUPS, OTHER_MODES, SETTINGS, Setting

_SHOWN_CHARACTERS = 64
_KEPT_CHARACTERS = 61
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_FAMILIES = ("BUCKET", "AWS", "R2")


class InvalidSettings(InvalidRequest):
    """Environment variables are unknown or wrong; `errors` has a sentence for each."""

    default_code = "INVALID_SETTINGS"

    def __init__(self, errors: tuple[str, ...], *, field: str) -> None:
        super().__init__("; ".join(errors), field=field)
        self.errors = errors


@dataclass(frozen=True)
class Settings:
    """The settings of one worker. The attributes are the variables of `SETTINGS`; see there.

    An attribute is named like its variable in lower case, without XICON_. Paths that are not set
    are None, texts empty. input_roots are absolute and normalised. notices: what to tell about
    old names, once at start.
    """

    modes: tuple[str, ...]
    preset: str
    steady_dancer_variant: str
    attention: str
    kernels: str
    memory: str
    enable_flash_attn: bool
    warmup: bool
    refresh_worker: bool
    serve_api_locally: bool
    models_dir: tuple[Path, ...]
    download: bool
    verify_weights: bool
    hf_token: str = field(repr=False)
    cache_dir: Path | None
    max_pixels: int
    max_frames: int
    default_video: Path | None
    strict_input: bool
    legacy_lenient: bool
    response_format: str
    moderation: str
    steadydancer_guide_scale: float | None
    steadydancer_condition_guide: float | None
    steadydancer_end_cfg: float | None
    steadydancer_seed: int | None
    input_roots: tuple[Path, ...]
    max_image_bytes: int
    max_video_bytes: int
    max_video_seconds: float
    fetch_timeout_s: float
    allowed_ports: tuple[int, ...]
    url_allowlist: tuple[str, ...]
    require_https: bool
    allow_private_urls: bool
    network_volume_path: Path
    output_dir: Path
    max_inline_bytes: int
    embed_params: bool
    bucket_endpoint_url: str = field(repr=False)  # may hold credentials
    bucket_name: str
    bucket_access_key_id: str = field(repr=False)
    bucket_secret_access_key: str = field(repr=False)
    bucket_session_token: str = field(repr=False)
    bucket_region: str
    bucket_prefix: str
    bucket_url_expires_s: int
    bucket_public_base_url: str
    bucket_addressing_style: str
    bucket_acl: str
    bucket_skip_check: bool
    allow_request_s3: bool
    tmp: Path
    job_timeout_s: int
    cancel_grace_s: int
    max_jobs: int
    log_level: str
    log_prompts: bool
    debug: bool
    notices: tuple[str, ...] = ()

    def preset_for(self, mode: str) -> str | None:
        """Returns the set of weights that a mode should use; None for its first."""
        if self.preset:
            return self.preset
        variant = {"fp16": "bf16"}.get(self.steady_dancer_variant, self.steady_dancer_variant)
        return variant if mode == "steady_dancer" else None

    def inline_limit(self, request_id: str) -> int:
        """Returns the most bytes of an answer's JSON; /runsync, seen by the id, allows more."""
        default = 19_000_000 if request_id.startswith("sync-") else 9_500_000
        return self.max_inline_bytes or default


def read_settings(env: Mapping[str, str]) -> Settings:
    """Returns the settings that the variables describe; unset and empty ones take the default.

    Args:
        env: names and texts, for example of the process.

    Raises:
        InvalidSettings: naming every unknown XICON_ variable and every bad value at once.
    """
    given = {name: text.strip() for name, text in env.items() if text.strip()}
    old, notices = translate(given)
    given |= old
    faults: list[tuple[str, str]] = _unknown(given)
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        values[setting.field], wrong = _value_or_fault(setting, given)
        faults += wrong
    credentials, fault = _credentials(given)
    values |= credentials
    faults += fault
    if faults:
        raise InvalidSettings(tuple(text for _, text in faults), field=faults[0][0])
    volume = values["network_volume_path"]
    values["input_roots"] = values["input_roots"] or (volume,)
    values["output_dir"] = values["output_dir"] or volume / "outputs"
    values["bucket_prefix"] = values["bucket_prefix"].strip("/")
    return Settings(**values, notices=tuple(notices))


def env_example() -> str:
    """Returns the text of an example file: every variable with its default, commented out."""
    lines = [
        "# Every variable of the worker. Booleans: 1, true, yes, on, or 0, false, no, off.",
        "# Made by `xicon_infer.settings.env_example`; a commented line shows the default.",
    ]
    for group, sentence in GROUPS.items():
        lines += ["", f"# {sentence}"]
        for setting in SETTINGS:
            if setting.group == group:
                lines += [f"# {_explained(setting)}", f"#{setting.name}={default_text(setting)}"]
    return "\n".join([*lines, ""])


def default_text(setting: Setting) -> str:
    """Returns the default as it would stand in the environment; "" if none."""
    default = setting.default
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(str(part) for part in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def allowed_text(setting: Setting) -> str:
    """Returns what a variable may hold, for a reader; "" where any text will do."""
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.kind in ("integer", "number"):
        return f"{setting.low:.20g} to {int(setting.high)}"
    return "0 or 1" if setting.kind == "flag" else ""


def _explained(setting: Setting) -> str:
    allowed = allowed_text(setting) if setting.kind != "flag" else ""
    other = f"; also read: {', '.join(setting.also)}" if setting.also else ""
    return f"{setting.help}{f' ({allowed})' if allowed else ''}{other}"


def _unknown(given: Mapping[str, str]) -> list[tuple[str, str]]:
    known = [setting.name for setting in SETTINGS]
    faults = []
    for name in sorted(given):
        if name.startswith("XICON_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; unset it"
            faults.append((name, f"Unknown setting {_cut(name)}{hint}"))
    return faults


def _value_or_fault(
    setting: Setting, given: Mapping[str, str]
) -> tuple[Any, list[tuple[str, str]]]:
    try:
        return _value(setting, given), []
    except InvalidRequest as error:
        return None, [(error.field or setting.name, error.message)]


def _value(setting: Setting, given: Mapping[str, str]) -> Any:
    name = next((n for n in (setting.name, *setting.also) if n in given), None)
    if name is None:
        return _default(setting)
    readers: dict[str, Callable[[Setting, str, str], Any]] = {
        "flag": _flag,
        "integer": _number,
        "number": _number,
        "text": lambda _, __, text: text,
        "choice": _choice,
        "list": _list,
        "ports": _ports,
        "path": _path,
        "paths": lambda setting, name, text: tuple(
            _path(setting, name, part) for part in text.split(":") if part
        ),
    }
    return readers[setting.kind](setting, name, given[name])


def _default(setting: Setting) -> Any:
    if setting.kind in ("integer", "number", "path") and setting.default == "":
        return None
    return Path(str(setting.default)) if setting.kind == "path" else setting.default


def _wrong(name: str, allowed: str, shown: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {allowed}, got {shown}", field=name)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_KEPT_CHARACTERS] + "..."


def _shown(setting: Setting, text: str) -> str:
    return "a secret" if setting.secret else _cut(json.dumps(text, ensure_ascii=False))


def _flag(setting: Setting, name: str, text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise _wrong(name, f"one of {', '.join((*TRUE, *FALSE))}", _shown(setting, text))
    return text.lower() in TRUE


def _number(setting: Setting, name: str, text: str) -> int | float:
    whole = setting.kind == "integer"
    if not (_INTEGER if whole else _NUMBER).fullmatch(text):
        kind = "a whole number" if whole else "a number"
        raise _wrong(name, f"{kind} {_range(setting)}", _shown(setting, text))
    value = int(text) if whole else float(text)
    if not math.isfinite(value) or not setting.low <= value <= setting.high:
        raise _wrong(name, _range(setting), _shown(setting, text))
    return value


def _range(setting: Setting) -> str:
    return f"between {int(setting.low)} and {int(setting.high)}"


def _choice(setting: Setting, name: str, text: str) -> str:
    for choice in setting.choices:
        if text.lower() == choice.lower():
            return choice
    raise _wrong(name, f"one of {', '.join(setting.choices)}", _shown(setting, text))


def _list(setting: Setting, name: str, text: str) -> tuple[str, ...]:
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    if setting.choices:
        modes = [part.replace("-", "_") for part in parts]
        parts = [OTHER_MODES.get(mode, mode) for mode in modes]
        if not parts or set(parts) - set(setting.choices):
            allowed = f"some of {', '.join(setting.choices)}, separated by commas"
            raise _wrong(name, allowed, _shown(setting, text))
    else:
        parts = [part.removeprefix("*").strip(".") for part in parts]
    return tuple(dict.fromkeys(part for part in parts if part))


def _ports(setting: Setting, name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    ports = [int(part) if _INTEGER.fullmatch(part) else 0 for part in parts]
    if not ports or not all(0 < port < 65536 for port in ports):
        allowed = "ports from 1 to 65535, separated by commas"
        raise _wrong(name, allowed, _shown(setting, text))
    return tuple(ports)


def _path(setting: Setting, name: str, text: str) -> Path:
    if "\0" in text:
        raise _wrong(name, "a path", _shown(setting, text))
    if setting.name in ("XICON_INPUT_ROOTS", "NETWORK_VOLUME_PATH"):
        # A relative root would depend on the folder that the worker was started in.
        if not text.startswith("/"):
            raise _wrong(name, "an absolute path", _shown(setting, text))
        return Path("/" + posixpath.normpath(text).lstrip("/"))
    return Path(text)


def _credentials(given: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Returns key, secret and token of the first family that is set; both of one family only."""
    empty = dict.fromkeys(
        ("bucket_access_key_id", "bucket_secret_access_key", "bucket_session_token"), ""
    )
    wanted = "BUCKET_ENDPOINT_URL" in given or "R2_ENDPOINT" in given
    for family in _FAMILIES:
        names = (f"{family}_ACCESS_KEY_ID", f"{family}_SECRET_ACCESS_KEY")
        present = [name for name in names if name in given]
        if len(present) == 1 and wanted:
            (missing,) = set(names) - set(present)
            text = f"{present[0]} is set but {missing} is not: set both, or neither"
            return empty, [(missing, text)]
        if len(present) == len(names):
            token = given.get("AWS_SESSION_TOKEN", "") if family == "AWS" else ""
            values = (given[names[0]], given[names[1]], token)
            return dict(zip(empty, values, strict=True)), []
    if wanted:
        text = "a bucket endpoint is set without BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY"
        return empty, [("BUCKET_ACCESS_KEY_ID", text)]
    return empty, []


__all__ = [
    "OLD_NAMES",
    "InvalidSettings",
    "Settings",
    "allowed_text",
    "default_text",
    "env_example",
    "read_settings",
]
