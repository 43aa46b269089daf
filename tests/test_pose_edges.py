"""The pose stage with difficult films: several persons, odd pictures, damage, interruption.

The films show dots where the joints are, so every answer is compared with the truth.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.pose import BATCH, PoseModels, observe
from tests.media.samples import loud_from, save_picture, tone
from tests.pose_films import BODY, CountingNetworks, dancer, draw, save_shots, shots
from tests.pose_films import contract_models as copy_models
from xicon_infer.job import make_job
from xicon_infer.media.video import probe, read_clip
from xicon_infer.pose.track import load_tracks
from xicon_infer.service import run_job
from xicon_infer.types import SilentProgress

UPRIGHT = (224, 128)
"""(H, W) of films and results where the size does not matter."""
WIDE = (128, 224)
BACKGROUND = 128
EXACT = 0.013
"""Of the height of the film: what the keypoint network of the tests misses at most."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return copy_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XICON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pose"


@pytest.fixture
def make(tmp_path, models):
    """Returns a function that runs a pose job on a film and returns its result and tracks."""

    def run(film: Path, progress=None, size=UPRIGHT, **values):
        given = {
            "pipeline": "pose",
            "video": film,
            "output": tmp_path / "out.mp4",
            "models_dir": models,
            "height": size[0],
            "width": size[1],
            "overwrite": True,
        } | values
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        result = run_job(make_job(plain), progress or SilentProgress())
        return result, load_tracks(result.outputs["track"])[
            0
        ] if "track" in result.outputs else None

    return run


def misses(track, truth: np.ndarray) -> np.ndarray:
    """Returns how far each body point is from the truth [F, 133, 2], as a share of the height."""
    height, width = track.pose.size
    found = track.pose.keypoints[:, list(BODY)] / (width, height)
    return np.linalg.norm((found - truth[:, list(BODY)]) * (width, height), axis=2) / height


def seen(track) -> np.ndarray:
    return track.body.joints.any(axis=(1, 2))


def slide(person: np.ndarray, first: float, last: float) -> np.ndarray:
    """Returns the person walking sideways, in widths of the picture."""
    moved = person.copy()
    moved[..., 0] += np.linspace(first, last, len(person))[:, None]
    return moved


def on_canvas(truth: np.ndarray, source, canvas, fit: str) -> np.ndarray:
    """Returns body points [F, 13, 2] in pixels of the canvas on which the film lies."""
    scale = (max if fit == "crop" else min)(c / s for c, s in zip(canvas, source, strict=True))
    from_centre = (truth[:, list(BODY)] - 0.5) * (source[1], source[0])
    return from_centre * scale + (canvas[1] / 2, canvas[0] / 2)


def brightness_at(picture: np.ndarray, points: np.ndarray) -> list[int]:
    """Returns the brightest value within a pixel of each point that lies in the picture."""
    height, width = picture.shape[:2]
    inner = [(round(x), round(y)) for x, y in points if 2 < x < width - 2 and 2 < y < height - 2]
    return [int(picture[y - 1 : y + 2, x - 1 : x + 2].max()) for x, y in inner]


@pytest.mark.parametrize("front", [0, 1])
def test_two_persons_cross_and_stay_themselves(tmp_path, make, front):
    size, frames = (224, 320), 36
    one = dancer(frames, size=size, tall=0.7)
    people = [slide(one, -0.3, 0.3), slide(one[::-1], 0.3, -0.3)]
    film = save_shots(tmp_path / "film.mkv", shots(people, size=size, in_front=front))
    for subject in (0, 1):
        result, track = make(film, subject=str(subject), size=(128, 160))
        assert len(result.pose["people"]) == 2
        # A few joints of whoever is too near are mistaken for one's own: the median stands.
        own, other = (
            np.median(misses(track, p), axis=1) for p in (people[subject], people[1 - subject])
        )
        if subject == front:
            assert own.max() < EXACT
        # Who is behind is hidden in the middle; before and after nobody is mistaken.
        apart = np.r_[:9, frames - 9 : frames]
        assert own[apart].max() < EXACT
        assert other[apart].min() > 0.3


@pytest.mark.parametrize("entry", [0.3, -0.25], ids=["far", "near"])
def test_one_leaves_and_another_enters(tmp_path, make, entry):
    size, frames, change = (168, 300), 24, 12
    leaver = slide(dancer(frames, size=size), -0.1, -0.6)
    comer = slide(dancer(frames, size=size, tall=0.75)[::-1], entry, entry - 0.1)
    scale = (size[1], size[0])
    pictures = [
        draw(size, [leaver[i] * scale, None] if i < change else [None, comer[i] * scale])
        for i in range(frames)
    ]
    _, track = make(save_shots(tmp_path / "film.mkv", np.stack(pictures)), size=WIDE)
    boxes, there = track.pose.bboxes, seen(track)
    centres, tall = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 3] - boxes[:, 1]
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1) / np.maximum(tall[:-1], 1)
    assert steps[there[:-1] & there[1:]].max() < 0.4, "nobody moves so far in a frame"
    assert misses(track, leaver)[:8].max() < 0.02
    if entry > 0:
        assert there.tolist() == [True] * change + [False] * (frames - change)


@pytest.mark.parametrize(("turn", "quarters"), [(90, -1), (180, 2), (270, 1)])
def test_a_film_turned_by_the_phone(tmp_path, make, turn, quarters):
    truth = dancer(3, size=UPRIGHT)
    stored = np.rot90(shots([truth], size=UPRIGHT), quarters, axes=(1, 2))
    film = save_shots(tmp_path / "film.mp4", stored, turn=turn)
    _, track = make(film)
    assert track.pose.size == UPRIGHT
    assert misses(track, truth).max() < EXACT


def test_a_dancer_upside_down(tmp_path, make):
    truth = dancer(3, size=UPRIGHT)
    truth[..., 1] = 1 - truth[..., 1]
    result, track = make(save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT)))
    assert misses(track, truth).max() < EXACT
    picture = read_clip(result.path).frames[0].max(axis=2)
    assert min(brightness_at(picture, on_canvas(truth, UPRIGHT, UPRIGHT, "crop")[0])) > 60


@pytest.mark.parametrize("source", [(224, 126), (126, 224)], ids=["9:16", "16:9"])
def test_the_figure_lies_over_the_person(tmp_path, make, source):
    truth = dancer(2, size=source, tall=0.7)
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=source))
    for canvas in (UPRIGHT, WIDE):
        for fit in ("crop", "pad"):
            result, _ = make(film, size=canvas, pose_fit=fit)
            points = on_canvas(truth, source, canvas, fit)
            for picture, spots in zip(read_clip(result.path).frames, points, strict=True):
                shine = brightness_at(picture.max(axis=2), spots)
                assert len(shine) >= 5
                assert min(shine) > 60, (canvas, fit)
                rows, columns = np.nonzero(picture.max(axis=2) > 60)
                drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                limit = np.array([*canvas[::-1], *canvas[::-1]])
                box = np.r_[spots.min(axis=0), spots.max(axis=0)].clip(0, limit)
                # Capsules are thick: the figure reaches a little beyond its joints.
                assert np.abs(drawn - box).max() < 7, (canvas, fit)


def test_a_variable_frame_rate_is_followed_by_time(tmp_path, make):
    stamps = [0, 40, 80, 120, 160, 400, 440, 480, 520, 560]
    truth = dancer(10, size=UPRIGHT, fps=12)
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT), stamps=stamps)
    assert probe(film).variable_frame_rate
    result, track = make(film)
    assert any("variable frame rate" in warning for warning in result.warnings)
    distances = [misses(track, np.repeat(shot[None], 10, axis=0)).mean(axis=1) for shot in truth]
    shown = np.argmin(distances, axis=0)
    assert np.min(distances, axis=0).max() < EXACT
    assert track.fps == Fraction(225, 14)  # nine steps in 0.56 seconds
    for frame, number in enumerate(shown):
        moment = float(frame / track.fps) * 1000
        assert abs(moment - stamps[number]) <= 45 or (number == 4 and moment < 400)


def test_120_frames_per_second_become_24(tmp_path, make):
    truth = dancer(36, size=UPRIGHT, fps=120)
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT), fps=120)
    result, track = make(film, fps=24)
    assert result.fps == track.fps == 24
    assert result.num_frames in (7, 8)
    assert misses(track, truth[::5][: result.num_frames]).max() < EXACT
    _, first = make(film, max_frames=3)
    assert first.fps == 120
    assert misses(first, truth[:3]).max() < EXACT


def test_one_frame_with_everything(tmp_path, make):
    truth = dancer(1, size=UPRIGHT)
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT))
    picture = save_picture(tmp_path / "who.png", shots([truth], size=UPRIGHT)[0])
    result, track = make(film, image=picture, smooth=1.0, overlay=True, sheet=True)
    assert result.num_frames == probe(result.outputs["overlay"]).num_frames == 1
    assert misses(track, truth).max() < EXACT
    assert abs(result.pose["alignment"]["m"] - 1) < 0.02


@pytest.mark.parametrize("size", [(225, 127), (226, 225), (449, 256)], ids=str)
def test_odd_sizes(tmp_path, make, size):
    truth = dancer(2, size=size)
    _, track = make(save_shots(tmp_path / "film.mkv", shots([truth], size=size)), overlay=True)
    assert misses(track, truth).max() < EXACT


def test_a_very_small_person(tmp_path, make):
    size = (448, 256)
    truth = dancer(2, size=size, tall=0.08, centre=(0.3, 0.6))
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=size))
    result, track = make(film, size=size)
    assert misses(track, truth).max() < EXACT / 2
    rows, columns = np.nonzero(read_clip(result.path).frames[0].max(axis=2) > 40)
    spots = on_canvas(truth, size, size, "crop")[0]
    drawn = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    assert np.abs(drawn - np.r_[spots.min(axis=0), spots.max(axis=0)]).max() < 5


@pytest.mark.parametrize("centre", [(0.98, 0.5), (0.5, 1.0), (0.0, 0.4)], ids=str)
def test_a_person_cut_off_by_the_border(tmp_path, make, centre):
    truth = dancer(2, size=UPRIGHT, centre=centre)
    result, track = make(save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT)))
    body = truth[:, list(BODY)]
    inside = ((body > 0.02) & (body < 0.98)).all(axis=2)
    outside = ((body < -0.05) | (body > 1.05)).any(axis=2)
    scores = track.pose.scores[:, list(BODY)]
    assert 0 < inside.sum() < inside.size
    assert outside.any()
    assert misses(track, truth)[inside].max() < EXACT
    assert scores[inside].min() > 0.3 > scores[outside].max()
    picture = read_clip(result.path).frames[0].max(axis=2)
    spots = on_canvas(truth, UPRIGHT, UPRIGHT, "crop")[0][inside[0]]
    assert min(brightness_at(picture, spots)) > 60


@pytest.fixture
def plain(tmp_path) -> Path:
    """Returns a film of one dancer, 3 frames."""
    truth = dancer(3, size=UPRIGHT)
    return save_shots(tmp_path / "plain.mkv", shots([truth], size=UPRIGHT))


def test_a_reference_without_anybody(tmp_path, make, plain):
    nobody = np.full((*UPRIGHT, 3), BACKGROUND, np.uint8)
    result, _ = make(plain, image=save_picture(tmp_path / "nobody.png", nobody))
    assert result.pose["alignment"]["mode"] == "skipped"
    assert "nobody" in result.pose["alignment"]["reason"]
    assert any("nobody was found in the reference" in warning for warning in result.warnings)
    without, _ = make(plain, output=tmp_path / "without.mp4")
    assert np.array_equal(read_clip(result.path).frames, read_clip(without.path).frames)


def test_of_two_in_the_reference_the_larger_counts(tmp_path, make):
    driver = dancer(1, size=WIDE)
    film = save_shots(tmp_path / "film.mkv", shots([driver], size=WIDE))
    large = dancer(1, size=WIDE, tall=0.65, centre=(0.25, 0.5))
    small = dancer(1, size=WIDE, tall=0.3, centre=(0.85, 0.5))
    found = []
    for number, people in enumerate(([large], [large, small], [small, large], [small])):
        path = save_picture(tmp_path / f"{number}.png", shots(people, size=WIDE)[0])
        found.append(make(film, image=path, size=WIDE)[0].pose["alignment"])
    shifts = [fit["p"] for fit in found]
    assert shifts[1:3] == pytest.approx(shifts[:1] * 2, abs=0.01)
    assert shifts[3] > shifts[0] + 50
    assert found[0]["m"] * found[0]["s"] == pytest.approx(0.65 / 0.8, abs=0.1)


def test_half_a_body_needs_wide_bounds(tmp_path, make, plain):
    whole = dancer(1, size=UPRIGHT)
    half = (whole - whole[:, :1]) * 2 + (0.5, 0.2)
    path = save_picture(tmp_path / "half.png", shots([half], size=UPRIGHT)[0])
    fits = {a: make(plain, image=path, align=a)[0] for a in ("auto", "wide")}
    auto, wide = (fits[a].pose["alignment"] for a in ("auto", "wide"))
    assert auto["m"] == pytest.approx(1.4)  # the end of its range
    assert wide["m"] == pytest.approx(2.0, abs=0.1)
    assert wide["reprojection_error_px"] < 1 < auto["reprojection_error_px"]


@pytest.mark.parametrize(("skip", "start"), [(0, 0.25), (3, 0.125)])
def test_the_sound_is_kept_in_its_place(tmp_path, make, skip, start):
    pictures = shots([dancer(12, size=UPRIGHT)], size=UPRIGHT)
    film = save_shots(tmp_path / "film.mkv", pictures, audio=tone(0.5, begin_s=0.25))
    result, _ = make(film, skip_frames=skip)
    assert loud_from(read_clip(result.path).audio) == pytest.approx(start, abs=0.02)
    assert read_clip(make(film, audio="none")[0].path).audio is None


def test_a_film_damaged_in_the_middle(tmp_path, make):
    truth = dancer(20, size=UPRIGHT)
    pictures = shots([truth], size=UPRIGHT)
    film = save_shots(tmp_path / "film.mov", pictures, codec="png", pix_fmt="rgb24")
    with av.open(str(film)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(film.read_bytes())
    for position, length in packets[8:11]:
        content[position : position + length] = np.random.default_rng(position).bytes(length)
    film.write_bytes(content)
    result, track = make(film)
    assert any("3 pictures could not be read" in warning for warning in result.warnings)
    assert misses(track, np.delete(truth, [8, 9, 10], axis=0)).max() < EXACT


class Impatient(SilentProgress):
    """Presses Ctrl-C in a stage, when as many frames are done."""

    def __init__(self, stage: str, frames: int) -> None:
        super().__init__()
        self.wanted, self.frames, self.name, self.helpers = stage, frames, "", 0

    def stage(self, name):
        self.name = name
        return super().stage(name)

    def step(self, done, total, unit="step"):
        if self.name in (self.wanted, "load pose models") and done >= self.frames:
            self.helpers = sum(thread.name == "ahead" for thread in threading.enumerate())
            raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_behind(tmp_path, make, cache):
    size = (64, 48)
    pictures = shots([dancer(96, size=size)], size=size)
    film = save_shots(tmp_path / "film.mkv", pictures)
    progress, kept = Impatient("find poses", BATCH), None
    try:
        make(film, progress, overlay=True)
    except KeyboardInterrupt as error:
        kept = error  # a service may keep it; the threads must not live on it
    assert kept is not None
    assert progress.helpers > 0, "the stages ran when they were stopped"
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
    assert not cache.exists() or not list(cache.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["film.mkv"]


def test_the_same_film_gives_the_same_track(tmp_path, make, plain):
    written = []
    for use_cache in (False, True, True):  # afresh, afresh and kept, from the cache
        result, _ = make(plain, pose_cache=use_cache, smooth=0.5)
        written.append(result.outputs["track"].read_bytes())
    assert written[0] == written[1] == written[2]


def test_the_overlay_shows_figure_and_film(tmp_path, make):
    truth = dancer(2, size=UPRIGHT)
    film = save_shots(tmp_path / "film.mkv", shots([truth], size=UPRIGHT))
    result, _ = make(film, overlay=True, crf=0)
    figure, over = (read_clip(path).frames for path in (result.path, result.outputs["overlay"]))
    source = read_clip(film).frames
    drawn = figure.max(axis=3) > 100
    nothing = np.stack([picture.max(axis=2) < 10 for picture in figure])
    mixed = figure[drawn] * 0.75 + source[drawn] * 0.25
    assert np.abs(over[drawn] - mixed).mean() < 8
    assert np.abs(over[nothing].astype(int) - source[nothing]).mean() < 8
    assert np.abs(over[drawn].astype(int) - source[drawn]).mean() > 40


def test_a_scail_video_keeps_rate_and_sound(tmp_path, make):
    truth = dancer(6, size=UPRIGHT, fps=12)
    pictures = shots([truth], size=UPRIGHT)
    sound = tone(0.5, begin_s=0.25)
    film = save_shots(tmp_path / "film.mkv", pictures, fps=12, audio=sound)
    who = save_picture(tmp_path / "who.png", pictures[0])
    values = {"pipeline": "scail", "preset": "tiny", "num_inference_steps": 1, "seed": 1}
    result, _ = make(film, image=who, size=(128, 128), **values)
    assert (result.num_frames, result.fps) == (5, 12)
    clip = read_clip(result.path)
    assert (len(clip.frames), clip.fps) == (5, 12)
    assert loud_from(clip.audio) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("slow", ["detector", "keypoints", "bodies"])
def test_memory_does_not_grow_with_the_film(slow):
    # Three queues of two batches, and one batch in every hand.
    bound = 11 * BATCH
    for frames in (300, 1200):
        counting = CountingNetworks(slow)
        networks = PoseModels(counting, counting, counting)
        found = observe(counting.film(frames), networks, SilentProgress(), frames)
        assert len(found) == counting.read == counting.finished == frames
        assert 0 < counting.most["waiting"] <= bound
        assert 0 < counting.most["alive"] <= bound + BATCH
