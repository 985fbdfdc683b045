from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from omninft.scorers.world_video import VideoFacts, video_facts
from omninft.types import Clip, OmniNFTError, Prompt
from omninft.worlds import bounce
from omninft.worlds.dataset import world_batch

PROMPT = Prompt("p", "", "", "")


def facts_of(video: np.ndarray, frame_rate: float = bounce.FRAME_RATE) -> VideoFacts:
    clip = Clip(video, frame_rate, np.zeros((1, 0), np.float32), bounce.SAMPLE_RATE, PROMPT)
    return video_facts(clip)


def shown(mixture: np.ndarray) -> VideoFacts:
    return facts_of(np.clip(np.round(mixture), 0, 255).astype(np.uint8))


def scene(kind: str = "ball", events: tuple[int, ...] = (5, 15), **changes) -> bounce.Scene:
    lead, trail = (12, 14) if kind == "ball" else (0, 0)
    times = tuple(f / bounce.FRAME_RATE for f in events)
    return replace(bounce.Scene(kind, "red", "mid", events, times, 13.3, lead, trail), **changes)


@pytest.fixture(scope="module")
def truth():
    batch = world_batch(256, 17)
    return batch.scenes, [facts_of(v) for v in batch.video], batch.video


def test_facts_of_real_clips_are_all_right(truth):
    scenes, facts, _ = truth
    assert [f.kind for f in facts] == [s.kind for s in scenes]
    assert [f.colour for f in facts] == [s.colour for s in scenes]
    for f, s in zip(facts, scenes, strict=True):
        np.testing.assert_allclose(f.event_times, s.event_times, atol=1e-9)
        assert f.event_strengths.min() > 0.99
        assert f.kinds[s.kind] > 0.99
        assert f.colours[s.colour] > 0.98
        assert f.presence > 0.99
        assert f.errors.shape == (bounce.NUM_FRAMES,)
        assert f.errors.max() < 0.04
        assert f.errors.mean() < 0.012


def test_tracks_and_levels_are_those_of_the_scene(truth):
    scenes, facts, _ = truth
    for f, s in zip(facts, scenes, strict=True):
        if s.kind == "ball":
            np.testing.assert_allclose(f.track[:, 0], s.x, atol=0.15)
            # The top of the picture cuts a ball that flies highest, which moves its centroid a little.
            np.testing.assert_allclose(f.track[:, 1], bounce.BALL_REST - bounce.ball_heights(s), atol=0.3)
        else:
            np.testing.assert_allclose(f.levels, bounce.lamp_levels(s.events), atol=0.02)


def test_the_square_is_found_where_it_is_and_only_there(truth):
    scenes, facts, _ = truth
    for f, s in zip(facts, scenes, strict=True):
        if s.square is None:
            assert f.square < 0.02
        else:
            assert f.square > 0.97
            np.testing.assert_allclose(f.square_track[:, 1], s.square[2], atol=0.25)
            assert np.abs(f.square_track[:, 0] - bounce.square_positions(s.square)).mean() < 0.4


def test_a_contact_between_two_frames_comes_back_between_them():
    video = bounce.render_video(scene()).astype(float)
    later = np.concatenate([video[:1], video[:-1]])
    times = [shown((1 - share) * video + share * later).event_times for share in (0.0, 0.3, 0.5, 0.7, 1.0)]
    contacts = np.array([t[-1] for t in times]) * bounce.FRAME_RATE
    assert contacts[0] == 15
    assert contacts[-1] == 16
    assert 15.2 < contacts[2] < 15.8
    assert (np.diff(contacts) > 0).all()


def test_a_flash_over_two_frames_is_one_flash_between_them():
    video = bounce.render_video(scene("lamp")).astype(float)
    later = np.concatenate([video[:1], video[:-1]])
    facts = shown((video + later) / 2)
    np.testing.assert_allclose(facts.event_times * bounce.FRAME_RATE, [5.5, 15.5], atol=0.1)
    assert facts.event_strengths.min() > 0.9


def test_a_bounce_off_the_floor_counts_less_the_higher_it_is():
    whole = bounce.render_video(scene())
    strengths = []
    for lift in (0, 2, 5):
        raised = whole.copy()
        raised[:, : bounce.FLOOR_TOP - lift] = whole[:, lift : bounce.FLOOR_TOP]
        raised[:, bounce.FLOOR_TOP - lift : bounce.FLOOR_TOP] = round(255 * bounce.BACKGROUND)
        strengths.append(facts_of(raised).event_strengths.sum())
    assert strengths[0] == pytest.approx(2, abs=0.02)
    assert 0.3 < strengths[1] < 1.5
    assert strengths[2] < 0.4


def test_half_a_flash_counts_about_half():
    bright, faint = scene("lamp", (5, 15)), scene("lamp", (5,))
    mixture = (bounce.render_video(bright).astype(float) + bounce.render_video(faint)) / 2
    facts = shown(mixture)
    np.testing.assert_allclose(facts.event_times * bounce.FRAME_RATE, [5, 15], atol=1e-6)
    assert facts.event_strengths[0] > 0.95
    assert 0.3 < facts.event_strengths[1] < 0.75


def test_a_fading_source_loses_presence_but_stays_what_it_is():
    empty = 255 * bounce.backdrop()
    for kind in bounce.KINDS:
        video = bounce.render_video(scene(kind))
        facts = [shown((1 - share) * video + share * empty) for share in (0, 0.2, 0.4, 0.6, 0.8)]
        presence = [f.presence for f in facts]
        assert all(a > b for a, b in zip(presence[:-1], presence[1:], strict=True))
        assert all(f.kinds[kind] > 0.99 * sum(f.kinds.values()) for f in facts)
        assert facts[0].colours["red"] > 0.98 > facts[-1].colours["red"] + 0.3


def test_a_ghost_of_another_colour_takes_its_share():
    red = bounce.render_video(scene(x=8.0)).astype(float)
    blue = bounce.render_video(scene(x=24.0, colour="blue")).astype(float)
    evidence = [shown((1 - a) * red + a * blue).colours["red"] for a in (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1)]
    assert all(a >= b for a, b in zip(evidence[:-1], evidence[1:], strict=True))
    assert 0.6 < evidence[3] < 0.95
    assert evidence[-1] < 0.02


def test_between_ball_and_lamp_the_evidence_changes_hands_gradually():
    ball, lamp = (bounce.render_video(scene(kind)).astype(float) for kind in ("ball", "lamp"))
    share = np.linspace(0, 1, 21)
    evidence = [shown((1 - a) * ball + a * lamp).kinds for a in share]
    as_ball = np.array([e["ball"] / (e["ball"] + e["lamp"]) for e in evidence])
    assert as_ball[0] > 0.99
    assert as_ball[-1] < 0.01
    assert (np.diff(as_ball) < 0.01).all()
    assert np.abs(np.diff(as_ball)).max() < 0.25


def test_a_faint_square_is_measured_by_its_opacity():
    path = (9.0, 1.1, 8.0)
    for kind in bounce.KINDS:
        without = bounce.render_video(scene(kind)).astype(float)
        with_square = bounce.render_video(scene(kind, square=path)).astype(float)
        for share in (0.25, 0.5, 0.75):
            facts = shown((1 - share) * without + share * with_square)
            assert facts.square == pytest.approx(share, abs=0.06)


def test_noise_and_blur_raise_errors_and_leave_the_facts():
    rng = np.random.default_rng(0)
    batch = world_batch(32, 5)
    clean = [facts_of(v) for v in batch.video]
    noisy = [shown(v + rng.normal(0, 25.5, v.shape)) for v in batch.video]
    blurred = [facts_of(gaussian_filter(v, (0, 1.5, 1.5, 0))) for v in batch.video]
    for worse, least in ((noisy, 0.08), (blurred, 0.03)):
        for f, c, s in zip(worse, clean, batch.scenes, strict=True):
            assert f.errors.mean() > c.errors.mean() + least
            assert (f.kind, f.colour) == (s.kind, s.colour)
            certain = f.event_times[f.event_strengths > 0.5]
            np.testing.assert_allclose(certain, s.event_times, atol=0.01)
    assert np.mean([f.sharpness for f in blurred]) < 0.5
    assert np.mean([f.sharpness for f in noisy]) == pytest.approx(1, abs=0.1)
    assert np.mean([f.sharpness for f in clean]) == pytest.approx(1, abs=0.01)


def test_empty_and_black_and_static_pictures_show_nothing():
    shape = (bounce.NUM_FRAMES, bounce.HEIGHT, bounce.WIDTH, 3)
    rng = np.random.default_rng(1)
    empty = np.broadcast_to(255 * bounce.backdrop(), shape)
    for name, pixels in (("empty", empty), ("black", np.zeros(shape)), ("static", rng.uniform(0, 255, shape))):
        facts = shown(pixels)
        assert facts.event_strengths.sum() < 0.6, name
        assert facts.presence < 0.45, name
        assert np.isfinite(facts.errors).all()
        if name != "static":
            assert facts.presence < 0.01
            assert sum(facts.colours.values()) < 0.01
            assert len(facts.event_times) == 0


def test_an_enlarged_clip_is_measured_as_the_original():
    video = bounce.render_video(scene(square=(9.0, 1.1, 8.0)))
    small, large = facts_of(video), facts_of(video.repeat(4, axis=1).repeat(4, axis=2))
    np.testing.assert_array_equal(small.errors, large.errors)
    assert small.square == large.square


@pytest.mark.parametrize(
    ("video", "rate", "found"),
    [
        (np.zeros((24, 32, 32, 3), np.uint8), 12.0, r"\[24, 32, 32, 3\]"),
        (np.zeros((25, 32, 48, 3), np.uint8), 12.0, r"\[25, 32, 48, 3\]"),
        (np.zeros((25, 32, 32, 3), np.float32), 12.0, "float32"),
        (np.zeros((25, 32, 32), np.uint8), 12.0, r"\[25, 32, 32\]"),
        (np.zeros((25, 32, 32, 3), np.uint8), 24.0, "found 24"),
    ],
)
def test_other_sizes_are_refused_with_what_was_found(video, rate, found):
    with pytest.raises(OmniNFTError, match=found):
        facts_of(video, rate)


def test_a_clip_is_measured_once():
    clip = Clip(bounce.render_video(scene()), 12.0, np.zeros((1, 0), np.float32), 16_000, PROMPT)
    assert video_facts(clip) is video_facts(clip)
