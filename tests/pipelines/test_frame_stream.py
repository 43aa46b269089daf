"""Frames leave the decoder in a thread: in order, without holding it up, and with every error."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from pipelines.frame_stream import DEPTH, Copy, begin_copy, stream_frames
from pipelines.frames import decode_frames
from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.models.vae import VAEConfig
from xicon_infer.types import SilentProgress

PIECES = (1, 4, 4, 4)
FRAMES = sum(PIECES)
PATIENCE_S = 20


def pieces(log=None, sizes=PIECES):
    start = 0
    for index, size in enumerate(sizes):
        if log is not None:
            log.append(f"decode {index}")
        # One grey value per frame tells it from all others.
        greys = torch.arange(start, start + size) * 10 / 127.5 - 1
        start += size
        yield greys.view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 4)


def blank(number=FRAMES):
    return np.zeros((number, 2, 4, 3), np.uint8)


def wanted(number=FRAMES):
    return (np.arange(number) * 10).astype(np.uint8)


def test_frames_come_in_order_and_all_of_them():
    frames, used, threads = blank(), [], set()

    def use(arriving):
        for part in arriving:
            threads.add(threading.current_thread().name)
            used.append(part.copy())

    stream_frames(pieces(), frames, progress=SilentProgress(), use=use)
    assert np.array_equal(frames[:, 0, 0, 0], wanted())
    assert [len(part) for part in used] == list(PIECES)
    assert np.array_equal(np.concatenate(used), frames)
    assert threads == {"frames"}


def test_the_next_piece_is_decoded_before_the_last_one_is_waited_for():
    """The fake device finishes a copy only after the work behind it was queued."""
    log, done = [], [threading.Event() for _ in PIECES]
    begun = iter(range(len(PIECES)))

    def copy(frames):
        index = next(begun)
        log.append(f"copy {index}")
        if index > 0:
            done[index - 1].set()
        if index == len(PIECES) - 1:
            done[index].set()

        def wait():
            assert done[index].wait(PATIENCE_S), "the decoder waits for its own copy"
            log.append(f"arrived {index}")

        return Copy(frames, wait)

    frames = blank()
    stream_frames(pieces(log), frames, progress=SilentProgress(), copy=copy)
    for index in range(len(PIECES) - 1):
        assert log.index(f"copy {index + 1}") < log.index(f"arrived {index}")
    assert np.array_equal(frames[:, 0, 0, 0], wanted())


def test_a_slow_user_holds_the_decoder_up_instead_of_filling_memory():
    go, log = threading.Event(), []
    sizes = (1,) * 12

    def use(arriving):
        next(arriving)
        assert go.wait(PATIENCE_S)

    def watch():
        time.sleep(0.4)
        log.append(len(log))
        go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream_frames(pieces(log, sizes), blank(12), progress=SilentProgress(), use=use)
    watcher.join()
    # One is used, `DEPTH` wait, one is in the decoder's hand.
    seen = next(entry for entry in log if isinstance(entry, int))
    assert seen <= DEPTH + 2


def test_all_frames_are_kept_where_the_user_stops_early():
    frames = blank()
    stream_frames(pieces(), frames, progress=SilentProgress(), use=next)
    assert np.array_equal(frames[:, 0, 0, 0], wanted())


def test_an_error_of_the_user_stops_the_decoder():
    log = []

    def use(arriving):
        next(arriving)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        stream_frames(pieces(log, (1,) * 50), blank(50), progress=SilentProgress(), use=use)
    assert len(log) < 50
    assert not [t for t in threading.enumerate() if t.name == "frames"]


@pytest.mark.parametrize("where", ["decode", "progress"])
def test_an_error_of_the_decoder_stops_the_user(where):
    ended = []

    def use(arriving):
        try:
            for _ in arriving:
                pass
            ended.append("as if complete")
        except BaseException:
            ended.append("stopped")
            raise

    def failing():
        yield from pieces(sizes=(1, 4))
        raise RuntimeError("decode failed")

    class Stop(SilentProgress):
        def step(self, done, total, unit="step"):
            if where == "progress" and done > 1:
                raise RuntimeError("progress failed")

    with pytest.raises(RuntimeError, match=f"{where} failed"):
        stream_frames(failing(), blank(), progress=Stop(), use=use)
    assert ended == ["stopped"]
    assert not [t for t in threading.enumerate() if t.name == "frames"]


def test_an_error_at_the_very_end_is_not_lost():
    def use(arriving):
        for _ in arriving:
            pass
        raise ValueError("the end is missing")

    with pytest.raises(ValueError, match="the end is missing"):
        stream_frames(pieces(), blank(), progress=SilentProgress(), use=use)


def test_progress_is_told_in_the_callers_thread():
    told = []

    class Told(SilentProgress):
        def step(self, done, total, unit="step"):
            told.append((done, total, unit, threading.current_thread().name))

    stream_frames(pieces(), blank(), progress=Told())
    name = threading.current_thread().name
    assert told == [(n, 13, "frame", name) for n in (1, 5, 9, 13)]


def test_the_host_has_nothing_to_copy():
    frames = torch.zeros(1, 2, 4, 3, dtype=torch.uint8)
    assert begin_copy(frames).frames is frames


@pytest.mark.parametrize("looped", [False, True])
def test_what_is_used_is_what_is_returned(looped):
    vae, used = tiny_vae(VAEConfig(dim=4, z_dim=16)), []
    options = {"tiles": None, "looped": looped, "progress": SilentProgress(), "piece": 1}
    latents = noise(1, 16, 4, 2, 2)
    frames = decode_frames(vae, latents, **options, use=lambda parts: used.extend(parts))
    assert len(frames) == (16 if looped else 13)
    assert np.array_equal(np.concatenate(used), frames)
    assert np.array_equal(decode_frames(vae, latents, **options), frames)


def test_a_piece_of_any_length_gives_the_same_frames():
    vae, latents = tiny_vae(VAEConfig(dim=4, z_dim=16), dtype=torch.float64), noise(1, 16, 4, 2, 2)
    options = {"tiles": None, "looped": False, "progress": SilentProgress()}
    found = [decode_frames(vae, latents, piece=piece, **options) for piece in (1, 2, 3, None)]
    assert all(np.array_equal(frames, found[0]) for frames in found)


@pytest.mark.gpu
def test_frames_arrive_from_a_gpu():
    frames = blank()
    stream_frames((piece.cuda() for piece in pieces()), frames, progress=SilentProgress())
    assert np.array_equal(frames[:, 0, 0, 0], wanted())
