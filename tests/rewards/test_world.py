from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from omninft.rewards import world as reward_module
from omninft.rewards.world import WorldReward, count_match, offset_kernel, synchrony
from omninft.rewards.world_held_out import NO_MATCH, WorldHeldOut
from omninft.scorers.world_sound import sound_facts
from omninft.types import Clip, Prompt, ScoreTable
from omninft.worlds import bounce
from omninft.worlds.dataset import world_batch
from omninft.worlds.wording import wordings

TRAINED = ("video_quality", "video_text", "audio_quality", "audio_text", "sync")


def prompt_for(attributes) -> Prompt:
    return Prompt("p", *wordings(attributes)[0])


def clip_of(video: np.ndarray, waveform: np.ndarray, prompt: Prompt) -> Clip:
    pixels = video if video.dtype == np.uint8 else np.clip(np.round(video), 0, 255).astype(np.uint8)
    sound = np.clip(np.atleast_2d(waveform), -1, 1).astype(np.float32)
    return Clip(pixels, bounce.FRAME_RATE, sound, bounce.SAMPLE_RATE, prompt)


@pytest.fixture(scope="module")
def world():
    return world_batch(256, 23)


@pytest.fixture(scope="module")
def truth(world) -> ScoreTable:
    clips = zip(world.scenes, world.video, world.waveforms, strict=True)
    return WorldReward().score([clip_of(v, w, prompt_for(s.attributes)) for s, v, w in clips])


def scored(world, video=None, waveform=None, count: int = 32) -> np.ndarray:
    """Scores [count, 5] of the first clips, changed by functions of (number, scene, original)."""
    clips = []
    for i, scene in enumerate(world.scenes[:count]):
        v = world.video[i] if video is None else video(i, scene, world.video[i].astype(float))
        w = world.waveforms[i] if waveform is None else waveform(i, scene, world.waveforms[i])
        clips.append(clip_of(v, w, prompt_for(scene.attributes)))
    return WorldReward().score(clips).values


def assert_only(changed: np.ndarray, truth: ScoreTable, lowered: dict[str, float], tolerance: float = 0.04) -> None:
    """Mean scores fall by at least `lowered`, every clip's in those columns; the other columns stay."""
    drop = truth.values[: len(changed)] - changed
    for k, name in enumerate(TRAINED):
        if name in lowered:
            assert drop[:, k].mean() > lowered[name], f"{name} fell by {drop[:, k].mean():.3f} only"
            assert drop[:, k].min() > 0, f"{name} of a clip did not fall"
        else:
            assert np.abs(drop[:, k]).max() < tolerance, f"{name} moved by {np.abs(drop[:, k]).max():.3f}"


def test_real_clips_score_near_1(truth):
    assert truth.names == TRAINED
    assert truth.valid.all()
    assert truth.values.min() > 0.94
    np.testing.assert_array_less(0.98, truth.values.mean(0))
    assert truth.values.max() <= 1


def test_routes_and_weights():
    assert {c.name: c.route for c in WorldReward.components} == {
        "video_quality": "video",
        "video_text": "video",
        "audio_quality": "audio",
        "audio_text": "audio",
        "sync": "joint",
    }
    assert {c.weight for c in WorldReward.components} == {1.0}


def test_later_sound_lowers_sync_alone_and_the_more_the_later(world, truth):
    means = [truth.column("sync")[:32].mean()]
    for shift in (0.005, 0.015, 0.04, 0.08, 0.15):

        def late(i, scene, wave, shift=shift):
            times = tuple(t + shift for t in scene.event_times)
            return bounce.render_audio(replace(scene, sound_times=times))

        changed = scored(world, waveform=late)
        assert_only(changed, truth, {"sync": 0.0})
        means.append(changed[:, 4].mean())
    assert (np.diff(means) < -0.02).all()
    assert means[1] > 0.93
    assert means[-1] < 0.3


def test_early_sound_costs_what_late_sound_costs(world):
    means = []
    for shift in (-0.06, 0.06):
        changed = scored(
            world,
            waveform=lambda i, s, w, shift=shift: bounce.render_audio(
                replace(s, sound_times=tuple(t + shift for t in s.event_times))
            ),
        )
        means.append(changed[:, 4].mean())
    assert means[0] == pytest.approx(means[1], abs=0.03)
    assert means[0] == pytest.approx(float(offset_kernel(np.array(0.06))), abs=0.03)


def test_a_sound_too_many_lowers_its_count_and_sync(world, truth):
    def extra(i, scene, wave):
        free = next(t for t in np.arange(0.1, 1.9, 0.05) if min(abs(t - e) for e in scene.event_times) > 0.24)
        return bounce.render_audio(replace(scene, sound_times=tuple(sorted((*scene.event_times, float(free))))))

    assert_only(scored(world, waveform=extra), truth, {"audio_text": 0.2, "sync": 0.2})


def test_a_missing_bounce_lowers_video_count_and_sync(world, truth):
    several = [i for i, s in enumerate(world.scenes[:128]) if s.kind == "lamp" and s.count > 1]
    clips, rows = [], []
    for i in several:
        scene = world.scenes[i]
        video = bounce.render_video(replace(scene, events=scene.events[:-1]))
        clips.append(clip_of(video, world.waveforms[i], prompt_for(scene.attributes)))
        rows.append(truth.values[i])
    drop = np.array(rows) - WorldReward().score(clips).values
    assert len(several) > 10
    assert drop[:, 1].min() > 0.1
    assert drop[:, 4].min() > 0.3
    assert np.abs(drop[:, [0, 2, 3]]).max() < 0.02


def test_another_colour_lowers_video_text_alone(world, truth):
    other = dict(zip(bounce.COLOURS, [*list(bounce.COLOURS)[1:], "red"], strict=True))
    changed = scored(world, video=lambda i, s, v: bounce.render_video(replace(s, colour=other[s.colour])))
    assert_only(changed, truth, {"video_text": 0.2})


def test_the_square_where_not_asked_or_missing_lowers_video_text_alone(world, truth):
    changed = scored(
        world,
        video=lambda i, s, v: bounce.render_video(replace(s, square=(9.0, 1.1, 7.0) if s.square is None else None)),
    )
    assert_only(changed, truth, {"video_text": 0.15})


def test_another_pitch_lowers_audio_text_alone(world, truth):
    other = {"low": "high", "mid": "low", "high": "mid"}
    changed = scored(world, waveform=lambda i, s, w: bounce.render_audio(replace(s, pitch=other[s.pitch])))
    assert_only(changed, truth, {"audio_text": 0.3})


def test_a_buzz_for_a_tone_lowers_audio_text(world, truth):
    other = {"ball": "lamp", "lamp": "ball"}
    changed = scored(world, waveform=lambda i, s, w: bounce.render_audio(replace(s, kind=other[s.kind])))
    assert_only(changed, truth, {"audio_text": 0.2}, tolerance=0.05)


def test_picture_noise_lowers_video_quality_alone_and_by_degrees(world, truth):
    noise = np.random.default_rng(0).normal(0, 255, (32, *world.video.shape[1:]))
    means = [truth.column("video_quality")[:32].mean()]
    for sigma in (0.03, 0.1, 0.2):
        changed = scored(world, video=lambda i, s, v, sigma=sigma: v + sigma * noise[i])
        assert_only(changed, truth, {"video_quality": 0.02}, tolerance=0.06 if sigma <= 0.1 else 0.4)
        means.append(changed[:, 0].mean())
    assert (np.diff(means) < -0.02).all()
    assert means[2] < 0.65


def test_blur_lowers_video_quality_by_degrees(world, truth):
    means = [truth.column("video_quality")[:32].mean()]
    for sigma in (0.7, 1.1, 1.5):
        changed = scored(world, video=lambda i, s, v, sigma=sigma: gaussian_filter(v, (0, sigma, sigma, 0)))
        means.append(changed[:, 0].mean())
        np.testing.assert_allclose(changed[:, 2:4], truth.values[:32, 2:4])
    assert (np.diff(means) < -0.02).all()
    assert means[-1] < 0.85


def test_haze_lowers_video_quality(world, truth):
    means = [truth.column("video_quality")[:32].mean()]
    for haze in (0.05, 0.1, 0.2):
        changed = scored(world, video=lambda i, s, v, haze=haze: v + haze * (255 - v))
        means.append(changed[:, 0].mean())
    assert (np.diff(means) < -0.05).all()
    assert means[-1] < 0.5


def test_sound_noise_lowers_audio_quality_alone_and_by_degrees(world, truth):
    noise = np.random.default_rng(0).normal(0, 1, bounce.NUM_SAMPLES)
    means = [truth.column("audio_quality")[:32].mean()]
    for sigma in (0.001, 0.003, 0.01):
        changed = scored(world, waveform=lambda i, s, w, sigma=sigma: w + sigma * noise)
        assert_only(changed, truth, {"audio_quality": 0.03})
        means.append(changed[:, 2].mean())
    assert (np.diff(means) < -0.05).all()


def test_clipped_sound_lowers_audio_quality_alone(world, truth):
    changed = scored(world, waveform=lambda i, s, w: np.clip(4 * w, -1, 1))
    assert_only(changed, truth, {"audio_quality": 0.1}, tolerance=0.05)


def test_clipping_itself_costs(world, monkeypatch):
    clip = clip_of(world.video[0], world.waveforms[0], prompt_for(world.scenes[0].attributes))
    clean = reward_module.audio_quality(clip)
    facts = sound_facts(clip)
    for share, cost in ((0.001, 0.1 / 11), (0.01, 0.05), (0.1, 1 / 11)):
        monkeypatch.setattr(reward_module, "sound_facts", lambda clip, share=share: replace(facts, clipping=share))
        assert clean - reward_module.audio_quality(clip) == pytest.approx(cost, abs=1e-6)


def test_black_video_scores_nothing_in_video_and_sync(world, truth):
    changed = scored(world, video=lambda i, s, v: 0 * v)
    assert_only(changed, truth, {"video_quality": 0.9, "video_text": 0.85, "sync": 0.9})
    assert (changed[:, 4] == 0).all()


def test_an_empty_scene_is_no_clip_of_the_world(world):
    changed = scored(world, video=lambda i, s, v: np.broadcast_to(255 * bounce.backdrop(), v.shape), count=4)
    assert changed[:, [0, 1]].max() < 0.1


def test_silence_scores_nothing_in_audio_and_sync(world, truth):
    changed = scored(world, waveform=lambda i, s, w: 0 * w)
    assert_only(changed, truth, {"audio_quality": 0.9, "audio_text": 0.85, "sync": 0.9})
    assert (changed[:, 4] == 0).all()
    assert not np.isnan(changed).any()


def test_a_ghost_of_another_clip_costs_by_its_strength(world):
    means = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.4):
        blend = scored(
            world,
            video=lambda i, s, v, share=share: (1 - share) * v + share * world.video[i + 60],
            waveform=lambda i, s, w, share=share: (1 - share) * w + share * world.waveforms[i + 60],
        )
        means.append(blend.mean(0))
    assert (np.diff(means, axis=0) < 0.005).all()
    middle = means[3]
    assert ((middle > 0.3) & (middle < 0.95)).all()


@pytest.mark.parametrize("kind", bounce.KINDS)
def test_fading_and_blurring_have_no_cliff(world, kind):
    i = next(i for i, s in enumerate(world.scenes) if s.kind == kind and s.square is not None)
    video, prompt = world.video[i].astype(float), prompt_for(world.scenes[i].attributes)
    empty = 255 * bounce.backdrop()
    steps = np.linspace(0, 1, 41)
    fading = [clip_of((1 - a) * video + a * empty, world.waveforms[i], prompt) for a in steps]
    blurring = [clip_of(gaussian_filter(video, (0, 3 * a, 3 * a, 0)), world.waveforms[i], prompt) for a in steps]
    quieter = [clip_of(world.video[i], world.waveforms[i] * 10 ** (-3 * a), prompt) for a in steps]
    for path in (fading, blurring, quieter):
        values = WorldReward().score(path).values
        assert np.abs(np.diff(values, axis=0)).max() < 0.15
        assert (values[0] - values[-1]).max() > 0.3


def test_a_prompt_of_another_world_is_missing_with_the_reason(world):
    prompt = Prompt("p", "a man walks his dog", "birds sing", "a man walks his dog birds sing")
    table = WorldReward().score([clip_of(world.video[0], world.waveforms[0], prompt)])
    assert table.valid.tolist() == [[True, False, True, False, True]]
    assert "a man walks his dog" in table.reasons[0, 1]
    assert "birds sing" in table.reasons[0, 3]
    assert set(table.reasons) == {(0, 1), (0, 3)}


def test_only_what_the_prompt_says_is_judged(world):
    i = next(i for i, s in enumerate(world.scenes) if s.square is None and s.colour == "green")
    right = Prompt("p", "something green", "a sound", "")
    wrong = Prompt("p", "something blue", "a sound", "")
    values = (
        WorldReward()
        .score([clip_of(world.video[i], world.waveforms[i], p) for p in (right, wrong)])
        .column("video_text")
    )
    assert values[0] > 0.95
    assert 0.2 < values[1] < 0.65


def test_a_clip_without_sound_is_missing_in_audio_and_sync_alone(world):
    prompt = prompt_for(world.scenes[0].attributes)
    clip = Clip(world.video[0], 12.0, np.zeros((1, 0), np.float32), 16_000, prompt)
    table = WorldReward().score([clip, clip_of(world.video[0], world.waveforms[0], prompt)])
    assert table.valid.tolist() == [[True, True, False, False, False], [True] * 5]
    assert table.reasons[0, 4] == "the clip has no sound"


def test_frames_of_another_size_are_missing_in_video_and_sync_alone(world):
    prompt = prompt_for(world.scenes[0].attributes)
    table = WorldReward().score([clip_of(world.video[0][:20], world.waveforms[0], prompt)])
    assert table.valid.tolist() == [[False, False, True, True, False]]
    assert "[20, 32, 32, 3]" in table.reasons[0, 0]


def test_samples_of_one_prompt_differ(world):
    rng = np.random.default_rng(0)
    prompt = prompt_for(world.scenes[0].attributes)
    clips = [
        clip_of(
            world.video[0] + rng.normal(0, 2, world.video[0].shape),
            world.waveforms[0] + rng.normal(0, 1e-4, bounce.NUM_SAMPLES),
            prompt,
        )
        for _ in range(8)
    ]
    values = WorldReward().score(clips).values
    assert all(len(set(column)) == 8 for column in values[:, :4].T)


@pytest.mark.parametrize(
    ("events", "onsets", "score"),
    [
        ([0.5, 1.0], [0.5, 1.0], 1.0),
        ([0.5, 1.0], [0.5], 1 / 2),
        ([0.5], [0.5, 1.0, 1.5], 1 / 3),
        ([0.5], [0.6], np.exp(-(np.hypot(0.1, 0.003) - 0.003) / 0.1)),
        ([], [0.5], 0.0),
        ([0.5], [], 0.0),
        ([], [], 0.0),
    ],
)
def test_synchrony_of_whole_events(events, onsets, score):
    found = synchrony(np.array(events), np.ones(len(events)), np.array(onsets), np.ones(len(onsets)))
    assert found == pytest.approx(score, abs=1e-9)


def test_synchrony_matches_one_to_one_and_best():
    one = np.ones(2)
    # Both onsets are nearer to the first event; only one of them may have it.
    found = synchrony(np.array([0.5, 1.0]), one, np.array([0.5, 0.7]), one)
    assert found == pytest.approx((1 + float(offset_kernel(np.array(0.3)))) / 2, abs=1e-9)


def test_half_events_count_half_and_faint_ones_little():
    time, onset, whole = np.array([0.5]), np.array([0.5]), np.ones(1)
    assert synchrony(time, 0.5 * whole, onset, whole) == pytest.approx(0.5)
    assert synchrony(time, 0.1 * whole, onset, 0.1 * whole) == pytest.approx(0.1)


@pytest.mark.parametrize("faint", [0.0, 0.1, 0.2, 0.3, 0.6, 1.0])
def test_events_that_a_clip_is_marked_with_are_those_that_count(world, faint):
    scene = next(s for s in world.scenes if s.kind == "lamp" and s.count == 2)
    first, second = (bounce.render_audio(replace(scene, sound_times=(t,))) for t in scene.event_times)
    clip = clip_of(world.video[world.scenes.index(scene)], first + faint * second, prompt_for(scene.attributes))
    WorldReward().score([clip])
    marked = clip.views["events"]
    strengths = sound_facts(clip).onset_strengths
    assert len(marked["audio"]) == (strengths >= 0.5).sum() == (1 if faint < 0.35 else 2)
    assert len(marked["video"]) == 2
    held_out = WorldHeldOut().score([clip])
    assert held_out.column("audio_count_right")[0] == (len(marked["audio"]) == 2)
    assert held_out.column("video_count_right")[0] == 1


def test_a_silent_clip_is_marked_with_no_sound(world):
    clip = clip_of(world.video[0], np.zeros(bounce.NUM_SAMPLES), prompt_for(world.scenes[0].attributes))
    WorldReward().score([clip])
    assert clip.views["events"]["audio"] == []


def test_kernel_and_count_have_slopes_everywhere():
    offsets = np.array([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
    kernel = offset_kernel(offsets)
    assert (np.diff(kernel) < -0.02).all()
    assert kernel[0] > 0.95
    np.testing.assert_array_equal(offset_kernel(-offsets), kernel)
    assert count_match(2.0, 2) == 1
    assert count_match(1.5, 2) == count_match(2.5, 2) == 0.5
    assert count_match(3, 1) > count_match(4, 1) > 0


def test_held_out_measures_of_real_and_of_spoilt_clips(world):
    scene = next(s for s in world.scenes if s.kind == "ball" and s.count == 2 and s.square is not None)
    video, prompt = bounce.render_video(scene), prompt_for(scene.attributes)
    late = bounce.render_audio(replace(scene, sound_times=tuple(t + 0.05 for t in scene.event_times)))
    one = bounce.render_audio(replace(scene, sound_times=scene.event_times[:1]))
    wrong_colour = bounce.render_video(replace(scene, colour="red" if scene.colour != "red" else "blue"))
    alone = bounce.render_video(replace(scene, square=None))
    good = bounce.render_audio(scene)
    blurred = gaussian_filter(video, (0, 1.5, 1.5, 0))
    cases = {
        "real": clip_of(video, good, prompt),
        "late": clip_of(video, late, prompt),
        "one": clip_of(video, one, prompt),
        "colour": clip_of(wrong_colour, good, prompt),
        "alone": clip_of(alone, good, prompt),
        "blurred": clip_of(blurred, good, prompt),
        "silent": clip_of(video, 0 * good, prompt),
    }
    table = WorldHeldOut().score(list(cases.values()))
    got = {case: dict(zip(table.names, row, strict=True)) for case, row in zip(cases, table.values, strict=True)}
    assert got["real"]["sync_offset_ms"] < 3
    assert got["late"]["sync_offset_ms"] == pytest.approx(50, abs=3)
    assert got["silent"]["sync_offset_ms"] == NO_MATCH
    facts = {case: row["all_facts"] for case, row in got.items()}
    assert facts == {"real": 1, "late": 1, "one": 0, "colour": 0, "alone": 0, "blurred": 1, "silent": 0}
    assert [got[c]["audio_count_right"] for c in ("real", "one", "silent")] == [1, 0, 0]
    assert [got[c]["video_count_right"] for c in ("real", "colour")] == [1, 1]
    assert [got[c]["square_right"] for c in ("real", "alone")] == [1, 0]
    assert got["blurred"]["sharpness"] < 0.5 < 0.99 < got["real"]["sharpness"]
    assert got["real"]["mel_error"] < 0.1


def test_held_out_directions_and_ranges(world, truth):
    specs = {c.name: c for c in WorldHeldOut.components}
    assert {n for n, c in specs.items() if not c.higher_is_better} == {"sync_offset_ms", "mel_error"}
    assert specs["sync_offset_ms"].unit == "ms"
    clips = [clip_of(world.video[i], world.waveforms[i], prompt_for(world.scenes[i].attributes)) for i in range(12)]
    table = WorldHeldOut().score(clips)
    for k, spec in enumerate(WorldHeldOut.components):
        low, high = spec.range
        assert (table.values[:, k] >= low).all()
        assert (table.values[:, k] <= high).all()
    assert (table.column("all_facts") == 1).all()


def test_scoring_64_clips_is_quick(world):
    clips = [clip_of(world.video[i], world.waveforms[i], prompt_for(world.scenes[i].attributes)) for i in range(65)]
    WorldReward().score(clips[64:])
    # Processor time of this thread: other load on the machine does not count.
    start = time.thread_time()
    WorldReward().score(clips[:64])
    assert time.thread_time() - start < 1.0
