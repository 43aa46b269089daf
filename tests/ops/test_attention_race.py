"""The race of the attention kernels with a fake clock, what is kept of it, and the choice."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager

import pytest
import torch

from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import attention_choice
from xicon_infer.ops.attention_choice import (
    Pair,
    Work,
    added,
    candidates,
    choose_attention,
    fastest,
    work_of,
)
from xicon_infer.ops.attention_race import (
    HOPELESS,
    ROUNDS,
    WARM_UPS,
    Race,
    Shape,
    race,
    random_parts,
    remembered,
    rounded_up,
)

CPU = torch.device("cpu")
SHAPE = Shape(1, 64, 64, 2, 64)


class Clock:
    """Kernels that take a fixed time, some of which fail at a certain call."""

    def __init__(self, seconds, failures=None):
        self.seconds = seconds
        self.failures = failures or {}
        self.calls = []
        self.open = None

    @contextmanager
    def running(self, name):
        assert self.open is None, "one kernel at a time"
        self.open = name
        try:
            yield lambda: name
        finally:
            self.open = None

    def time(self, call):
        name = call()
        assert self.open == name, "timed outside its context"
        self.calls.append(name)
        turn, error = self.failures.get(name, (None, None))
        if self.calls.count(name) == turn:
            raise error
        first = 50.0 if self.calls.count(name) < WARM_UPS else 1.0
        return first * self.seconds[name]

    def race(self):
        return race(tuple(self.seconds), self.running, self.time)


def test_the_fastest_stands_first_and_the_first_calls_do_not_count():
    found = Clock({"a": 3.0, "b": 2.0, "c": 2.5}).race()
    assert list(found.seconds) == ["b", "c", "a"]
    assert found.seconds["b"] == 2.0
    assert found.dropped == {}


def test_kernels_run_in_turns():
    clock = Clock({"a": 1.0, "b": 1.0})
    clock.race()
    assert clock.calls == ["a", "b"] * (WARM_UPS + ROUNDS)


def test_the_hopeless_are_not_timed_again():
    clock = Clock({"a": 1.0, "b": 1.01 * HOPELESS, "c": 0.99 * HOPELESS})
    found = clock.race()
    assert set(found.seconds) == {"a", "c"}
    assert "2.0 times the best" in found.dropped["b"]
    assert clock.calls.count("b") == WARM_UPS


@pytest.mark.parametrize("turn", [1, WARM_UPS, WARM_UPS + 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (RuntimeError("no kernel\nfor this"), "no kernel"),
        (AssertionError("head_dim"), "head_dim"),
    ],
)
def test_who_fails_leaves_with_its_reason(turn, error, reason):
    clock = Clock({"a": 1.0, "b": 1.5}, {"a": (turn, error)})
    found = clock.race()
    assert found.seconds == {"b": 1.5}
    assert found.dropped == {"a": reason}
    assert clock.calls.count("a") == turn


def test_a_bug_is_not_taken_for_a_kernel_that_does_not_run():
    with pytest.raises(ZeroDivisionError):
        Clock({"a": 1.0}, {"a": (1, ZeroDivisionError())}).race()


def test_nobody_arrives():
    clock = Clock({"a": 1.0, "b": 1.0}, dict.fromkeys("ab", (1, RuntimeError("no"))))
    assert clock.race() == Race({}, {"a": "no", "b": "no"})


def test_buckets():
    lengths = {32760: 32768, 29757: 32768, 24024: 24576, 7917: 8192, 95920: 98304}
    lengths |= {512: 512, 257: 320, 513: 640, 1: 1, 2: 2, 5: 5, 9: 10}
    assert {length: rounded_up(length) for length in lengths} == lengths
    for length in range(1, 3000):
        up = rounded_up(length)
        assert length <= up <= 1.25 * length + 1
        assert rounded_up(up) == up
        assert rounded_up(length + 1) >= up


KEY = {"kernels": ["a", "b"], "bucket": [1, 2]}
RESULT = Race({"a": 0.5}, {"b": "no"})


def test_what_was_measured_is_kept(tmp_path):
    folder = tmp_path / "new"
    assert remembered(KEY, folder, lambda: RESULT) == RESULT
    again = remembered(KEY, folder, lambda: pytest.fail("measured again"))
    assert again == RESULT
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    other = Race({"b": 1.0})
    assert remembered({**KEY, "bucket": [1, 3]}, folder, lambda: other) == other
    assert len(list(folder.iterdir())) == 2


def test_nothing_is_kept_without_a_folder_or_a_result(tmp_path):
    assert remembered(KEY, None, lambda: RESULT) == RESULT
    remembered(KEY, tmp_path, lambda: Race({}, {"a": "no"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "\x00\xff", '{"key": {}}'),
        json.dumps({"key": KEY, "seconds": {"a": "fast"}, "dropped": {}}),
        json.dumps({"key": KEY, "seconds": {"a": -1}, "dropped": {}}),
        json.dumps({"key": KEY, "seconds": {"other": 1}, "dropped": {}}),
        json.dumps({"key": {"kernels": ["a"]}, "seconds": {"a": 1}, "dropped": {}}),
        json.dumps({"key": KEY, "seconds": {}, "dropped": {}}),
    ],
)
def test_a_damaged_file_is_told_and_made_anew(tmp_path, caplog, text):
    remembered(KEY, tmp_path, lambda: RESULT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert remembered(KEY, tmp_path, lambda: Race({"b": 2.0})) == Race({"b": 2.0})
    assert "measured anew" in caplog.text
    assert remembered(KEY, tmp_path, lambda: pytest.fail("again")) == Race({"b": 2.0})


def test_a_folder_that_cannot_be_written_is_told(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert remembered(KEY, blocked, lambda: RESULT) == RESULT
    assert "cannot be kept" in caplog.text


def test_a_pair_that_one_pass_can_use():
    own = Race({"flash": 1.0, "cudnn": 2.0, "flash2": 5.0})
    cross = Race({"cudnn": 0.1, "flash": 0.9, "flash2": 0.5})
    names = ("cudnn", "flash", "flash2")
    # flash with cudnn would be 1.1, but both are PyTorch's; with flash2 it is 1.5, alone 1.9.
    assert fastest(names, own, cross) == Pair("flash", "flash2")
    assert fastest(("cudnn", "flash"), own, cross) == Pair("flash", "flash")
    assert fastest(names, Race(), cross) is None


def test_the_order_decides_a_tie():
    times = Race({"flash": 1.0, "cudnn": 1.019})
    assert fastest(("cudnn", "flash"), times, times) == Pair("cudnn", "cudnn")
    assert fastest(("flash", "cudnn"), times, times) == Pair("flash", "flash")
    slower = Race({"flash": 1.0, "cudnn": 1.05})
    assert fastest(("cudnn", "flash"), slower, slower) == Pair("flash", "flash")


def test_all_cross_attentions_of_a_block_count():
    text, image = Race({"a": 1.0, "b": 2.0}), Race({"a": 3.0, "c": 1.0}, {"b": "no"})
    assert added([text, image]) == Race({"a": 4.0}, {"b": "no"})
    assert added([]) == Race()


def work(queries=64, keys=(16, 10)) -> Work:
    tokens = torch.empty(1, queries, 128)
    return work_of(tokens, 2, [torch.empty(1, count, 2, 64) for count in keys])


def test_what_a_pass_works_on():
    own = Shape(1, 64, 64, 2, 64)
    cross = (Shape(1, 64, 16, 2, 64), Shape(1, 64, 10, 2, 64))
    assert work() == Work(own, cross, CPU, torch.float32)


@pytest.fixture
def narrow(monkeypatch):
    """A device with three exact kernels and an 8-bit one, none of which is run."""
    order = ("cudnn", "flash2", "math")
    monkeypatch.setattr(attention_choice, "order_for", lambda device: order)
    runs = lambda name, *rest: "" if name != "sage" else "not here"  # noqa: E731
    monkeypatch.setattr(attention_choice, "problem_of", runs)
    monkeypatch.setattr(attention_choice, "_CHOICES", {})


TIMES = {"cudnn": 2.0, "flash2": 3.0, "int8": 1.0}


class Racer:
    def __init__(self):
        self.seen = []

    def __call__(self, shape, names):
        self.seen.append((shape, names))
        share = shape.keys / shape.queries
        return Race({name: TIMES[name] * share for name in names})


def test_8_bit_takes_part_only_where_it_is_allowed(narrow):
    racer = Racer()
    choice = choose_attention("auto", work(), racer=racer)
    assert choice.kernels == Pair("cudnn", "cudnn")
    assert choice.how == "timed"
    assert {names for _, names in racer.seen} == {("cudnn", "flash2")}
    allowed = choose_attention("auto8", work(), racer=racer)
    assert allowed.kernels == Pair("int8", "cudnn")
    assert candidates("auto8", work()) == ("cudnn", "flash2", "int8")


def test_cross_attention_is_never_8_bit(narrow):
    racer = Racer()
    choose_attention("auto8", work(), racer=racer)
    for shape, names in racer.seen:
        assert ("int8" in names) == (shape.queries == shape.keys)


def test_the_race_is_run_once_for_a_bucket(narrow, caplog):
    racer = Racer()
    with caplog.at_level(logging.INFO):
        first = choose_attention("auto", work(61), racer=racer)
        second = choose_attention("auto", work(63), racer=racer)
    assert [first.tokens, second.tokens] == [61, 63]
    assert len(racer.seen) == 3
    assert caplog.text.count("attention kernels") == 1
    choose_attention("auto", work(200), racer=racer)
    assert len(racer.seen) == 6


def test_ordered_times_nothing(narrow):
    racer = Racer()
    choice = choose_attention("ordered", work(), racer=racer)
    assert choice.how == "ordered"
    assert racer.seen == []


def test_nobody_arriving_leaves_the_first_of_the_order(narrow):
    choice = choose_attention("auto", work(), racer=lambda *_: Race({}, {"cudnn": "no"}))
    assert choice.how == "ordered"
    assert choice.kernels == Pair("flash", "flash")  # what `choose_backend` finds on this machine
    assert choice.told()["self_left_out"] == {"cudnn": "no"}


def test_what_the_report_says(narrow):
    told = choose_attention("auto8", work(), racer=Racer()).told()
    assert told["tokens"] == 64
    assert (told["self"], told["cross"], told["chosen"]) == ("int8", "cudnn", "timed")
    assert told["self_ms"] == {"int8": 1000.0, "cudnn": 2000.0, "flash2": 3000.0}
    assert set(told["cross_ms"]) == {"cudnn", "flash2"}
    json.dumps(told)


def test_a_kernel_that_is_asked_for_is_not_timed():
    asked = choose_attention("math", work(), racer=lambda *_: pytest.fail("timed"))
    assert (asked.kernels, asked.how) == (Pair("math", "math"), "asked")
    narrow8 = choose_attention("int8", work())
    assert narrow8.kernels == Pair("int8", "flash")
    with pytest.raises(BackendUnavailable, match="flash3"):
        choose_attention("flash3", work())


@pytest.mark.parametrize("policy", ["auto", "auto8", "ordered"])
def test_the_cpu_times_nothing(policy):
    choice = choose_attention(policy, work())
    assert (choice.kernels, choice.how) == (Pair("flash", "flash"), "ordered")
    assert choice.told() == {"tokens": 64, "self": "flash", "cross": "flash", "chosen": "ordered"}


def test_on_meta_the_work_is_counted():
    tokens = torch.empty(1, 4, 128, device="meta")
    assert choose_attention("auto", work_of(tokens, 2, [])).kernels == Pair("math", "math")


def test_parts_are_random_and_the_same_again():
    first, second = (random_parts(SHAPE._replace(keys=9), CPU, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [tuple(part.shape) for part in first] == [(1, 64, 2, 64), (1, 9, 2, 64), (1, 9, 2, 64)]
    assert 0.9 < first[0].float().std() < 1.1
