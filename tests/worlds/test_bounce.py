"""The world's ground truth: what is drawn and heard is what the scene says."""

from __future__ import annotations

import numpy as np
import pytest

from omninft.worlds import bounce
from omninft.worlds.dataset import Defects, spoil, world_batch


def scenes(count: int = 200, seed: int = 0) -> list[bounce.Scene]:
    rng = np.random.default_rng(seed)
    attributes = bounce.all_attributes()
    return [bounce.sample_scene(rng, attributes[i % len(attributes)]) for i in range(count)]


def test_every_combination_is_there_once() -> None:
    attributes = bounce.all_attributes()
    assert len(attributes) == len(set(attributes)) == 2 * 4 * 3 * 3 * 2


def test_scenes_have_what_was_asked_for() -> None:
    attributes = bounce.all_attributes()
    for i, scene in enumerate(scenes(144)):
        assert scene.attributes == attributes[i]


def test_events_lie_apart_and_inside() -> None:
    for scene in scenes():
        gaps = np.diff(scene.events)
        assert (gaps >= bounce.MIN_GAP).all()
        assert scene.events[0] >= 2
        assert scene.events[-1] <= 21


def test_a_ball_touches_the_floor_exactly_at_its_events() -> None:
    for scene in scenes():
        if scene.kind == "ball":
            heights = bounce.ball_heights(scene)
            assert tuple(np.flatnonzero(heights == 0)) == scene.events
            assert heights.max() < bounce.BALL_REST  # never leaves the picture by the top


def test_gravity_is_constant_between_hits() -> None:
    scene = next(s for s in scenes() if s.kind == "ball" and s.count == 1)
    heights = bounce.ball_heights(scene)
    before = np.diff(heights[: scene.events[0] + 1], 2)
    np.testing.assert_allclose(before, -bounce.GRAVITY, atol=1e-12)


def test_a_lamp_is_brightest_at_its_events() -> None:
    for scene in scenes():
        if scene.kind == "lamp":
            levels = bounce.lamp_levels(scene.events)
            assert tuple(np.flatnonzero(levels == 1.0)) == scene.events
            assert levels.min() == bounce.LAMP_OFF


def test_sound_begins_at_the_event_to_a_millisecond() -> None:
    for scene in scenes(60):
        wave = np.abs(bounce.render_audio(scene))
        for time in scene.event_times:
            start = round(time * bounce.SAMPLE_RATE)
            assert wave[max(0, start - 80) : start].max(initial=0) < 0.05  # 5 ms before
            assert wave[start : start + 160].max() > 0.15  # 10 ms after


@pytest.mark.parametrize("kind", bounce.KINDS)
@pytest.mark.parametrize("pitch", ["low", "mid", "high"])
def test_the_fundamental_is_the_pitch(kind: str, pitch: str) -> None:
    carrier = bounce.carrier(kind, pitch)
    spectrum = np.abs(np.fft.rfft(carrier[:16_000]))  # 1 Hz bins
    assert spectrum.argmax() == bounce.PITCHES[kind][pitch]
    assert bounce.PITCHES[kind][pitch] % 100 == 0
    np.testing.assert_allclose(carrier[:160], carrier[160:320], atol=1e-9)  # one cycle a hop


def test_the_source_is_where_the_mask_says() -> None:
    scene = next(s for s in scenes() if s.kind == "ball" and s.square is None)
    frames = bounce.render_video(scene).astype(float) / 255
    mask = bounce.source_mask(scene) == 1
    colour = np.array(bounce.COLOURS[scene.colour])
    np.testing.assert_allclose(frames[mask], np.broadcast_to(colour, frames[mask].shape), atol=0.003)
    assert not mask.all(axis=(1, 2)).any()


def test_the_square_stays_inside_and_moves_at_its_speed() -> None:
    for scene in scenes():
        if scene.square is not None:
            x = bounce.square_positions(scene.square)
            assert x.min() >= bounce.SQUARE / 2
            assert x.max() <= bounce.WIDTH - bounce.SQUARE / 2
            assert np.abs(np.diff(x)).max() <= abs(scene.square[1]) + 1e-9


def test_batches_are_reproducible_and_seeds_differ() -> None:
    a, b, c = world_batch(8, 3), world_batch(8, 3), world_batch(8, 4)
    assert np.array_equal(a.video, b.video)
    assert np.array_equal(a.waveforms, b.waveforms)
    assert not np.array_equal(a.video, c.video)
    assert a.video.shape == (8, 25, 32, 32, 3)
    assert a.waveforms.shape == (8, 32_800)


def test_defects_touch_the_sound_only_and_in_their_share() -> None:
    rng = np.random.default_rng(0)
    defects = Defects(out_of_time=0.4, miscounted=0.1)
    honest = scenes(3000)
    spoiled = [spoil(s, rng, defects) for s in honest]
    shifted = [s for s in spoiled if len(s.sound_times) == s.count and s.sound_times != s.event_times]
    miscounted = [s for s in spoiled if len(s.sound_times) != s.count]
    assert len(shifted) / 3000 == pytest.approx(0.4, abs=0.03)
    # Where three sounds leave no room for a fourth, none is added.
    assert len(miscounted) / 3000 == pytest.approx(0.08, abs=0.02)
    assert [s.events for s in spoiled] == [s.events for s in honest]
    shifts = [abs(s.sound_times[-1] - s.event_times[-1]) for s in shifted if 0.3 < s.event_times[-1] < 1.6]
    assert min(shifts) >= 0.06 - 1e-9
    assert max(shifts) <= 0.25 + 1e-9
