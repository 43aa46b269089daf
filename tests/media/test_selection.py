"""Which frames are loaded."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.golden import Golden
from tests.parity.media import replay_frame_selection
from xicon_infer.errors import InvalidRequest
from xicon_infer.media.selection import Selection, emissions, loaded_fps, select_frames

GOLDEN = Path(__file__).parents[1] / "golden" / "wan_core"

OPTIONS = st.fixed_dictionaries(
    {
        "force_rate": st.sampled_from([0.0, 8.0, 16.0, 23.976, 24.0, 30.0, 60.0]),
        "frame_load_cap": st.integers(0, 40),
        "skip_first_frames": st.integers(0, 12),
        "select_every_nth": st.integers(1, 5),
    }
)
RATES = st.sampled_from([10.0, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])


def test_equals_the_reference():
    checks = replay_frame_selection(Golden(GOLDEN / "vhs_frame_selection.json", []))
    assert len(checks) == 5 * 26
    assert [check.name for check in checks if not check.ok] == []


def test_30_to_24_drops_every_fifth():
    assert list(select_frames(30.0, 13, force_rate=24.0)) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 12]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(rate=RATES, options=OPTIONS, frames=st.integers(1, 60))
def test_unknown_length_gives_the_same_frames(rate, options, frames):
    known = list(select_frames(rate, frames, **options))
    endless = islice(select_frames(rate, None, **options), len(known) + 1)
    assert [index for index in endless if index < frames] == known
    assert known == sorted(known)
    assert len(known) <= (options["frame_load_cap"] or len(known))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(rate=RATES, options=OPTIONS, frames=st.integers(1, 60))
def test_skip_and_every_nth_slice_the_resampled_list(rate, options, frames):
    plain = list(select_frames(rate, frames, force_rate=options["force_rate"]))
    cut = plain[options["skip_first_frames"] :: options["select_every_nth"]]
    assert list(select_frames(rate, frames, **options)) == cut[: options["frame_load_cap"] or None]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(rate=RATES, options=OPTIONS, frames=st.integers(1, 60))
def test_wan_rule_keeps_4n_plus_1(rate, options, frames):
    plain = list(select_frames(rate, frames, **options))
    ruled = list(select_frames(rate, frames, **options, frame_rule="wan"))
    assert ruled == plain[: (len(plain) - 1) // 4 * 4 + 1 if plain else 0]


@pytest.mark.parametrize(
    "change",
    [
        {"force_rate": 24.0},
        {"frame_load_cap": 5},
        {"skip_first_frames": 2},
        {"select_every_nth": 2},
        {"frame_rule": "wan"},
    ],
)
def test_every_option_changes_the_frames(change):
    assert list(select_frames(30.0, 32, **change)) != list(select_frames(30.0, 32))


def test_the_source_rate_changes_the_frames():
    assert list(select_frames(25.0, 32, force_rate=24.0)) != list(
        select_frames(30.0, 32, force_rate=24.0)
    )


def test_emissions_end_with_the_cap():
    assert list(emissions(12.0, force_rate=24.0, frame_load_cap=4)) == [1, 2, 1]


def test_loaded_fps_counts_the_thinning():
    assert loaded_fps(30.0) == 30.0
    assert loaded_fps(30.0, force_rate=24.0, select_every_nth=3) == 8.0


def test_selection_holds_exact_rates():
    selection = Selection(force_rate=Fraction(24000, 1001), select_every_nth=2)
    assert selection.loaded_rate(Fraction(30)) == Fraction(12000, 1001)
    assert Selection().loaded_rate(Fraction(30)) == 30


def test_audio_window_follows_skip_cap_and_rate():
    selection = Selection(Fraction(24), frame_load_cap=20, skip_first_frames=3, select_every_nth=3)
    assert selection.audio_window(30.0) == (0.125, 2.5)
    assert Selection().audio_window(30.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("force_rate", Fraction(0)),
        ("force_rate", Fraction(10**7)),
        ("frame_load_cap", -1),
        ("skip_first_frames", -1),
        ("select_every_nth", 0),
    ],
)
def test_impossible_selections_are_refused(name, value):
    with pytest.raises(InvalidRequest, match=name) as caught:
        Selection(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_impossible_source_rates_are_refused(rate):
    with pytest.raises(InvalidRequest, match="source_fps"):
        select_frames(rate, 3)
