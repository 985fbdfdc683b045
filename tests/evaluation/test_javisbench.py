"""Formulas and windows with injected features of known answer; each quirk is one switch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omninft.evaluation.javisbench import (
    JUDGES,
    METRICS,
    AudioQuality,
    BindScores,
    DeSync,
    Embeddings,
    TextSound,
    TextVideo,
    VideoQuality,
    avh_score,
    javis_score,
    javis_windows,
)
from omninft.evaluation.leaderboard import PUBLISHED_METRICS
from omninft.scorers.imagebind import ImageBind, ImageBindScorer
from omninft.scorers.imagebind_inputs import TextTokens
from omninft.types import Clip, OmniNFTError
from tests.moving_clips import moving_clip, with_sound
from tests.scorers.numpy_layers import randomise
from tests.scorers.test_clip import small_scorer
from tests.scorers.test_imagebind import TINY, small_tokenizer


def test_columns_are_those_of_the_published_table_and_motion_quality() -> None:
    mine = [(m.name, m.label, m.higher_is_better, m.unit) for m in METRICS]
    assert mine[:10] == [(m.name, m.label, m.higher_is_better, m.unit) for m in PUBLISHED_METRICS]
    assert [m.name for m in METRICS[10:]] == ["mq"]
    given = [name for entry in JUDGES.values() for name in entry.metrics]
    assert sorted(given) == sorted(m.name for m in METRICS)
    for entry in JUDGES.values():
        assert [spec.name for spec in entry.make().components] == list(entry.metrics)


@pytest.mark.parametrize(
    ("frames", "rate", "samples", "frame_starts", "frame_count", "sample_starts"),
    [
        (96, 24, 64_000, (0, 12, 24, 36, 48), 48, (0, 8000, 16_000, 24_000, 32_000)),
        (
            121,
            24,
            80_667,
            (0, 12, 24, 36, 48, 60, 72, 73),
            48,
            (0, 8000, 16_000, 24_000, 32_000, 40_000, 48_000, 48_667),
        ),
        (96, 24, 48_000, (0, 12, 24), 48, (0, 8000, 16_000)),  # as many as both have
        (48, 24, 64_000, (0,), 48, (0,)),
        (30, 24, 20_000, (0,), 30, (0,)),  # shorter: one window of the whole clip
        (49, 24, 32_001, (0, 1), 48, (0, 1)),
        (120, 30, 64_000, (0, 15, 30, 45, 60), 60, (0, 8000, 16_000, 24_000, 32_000)),
    ],
)
def test_windows_of_javis_score(frames, rate, samples, frame_starts, frame_count, sample_starts) -> None:
    found = javis_windows(frames, rate, samples)
    assert (found.frame_starts, found.frames, found.sample_starts) == (frame_starts, frame_count, sample_starts)
    assert found.samples == min(32_000, samples)


def at(cosine: float | np.ndarray) -> np.ndarray:
    """Unit vectors of these cosines with [1, 0]."""
    cosine = np.asarray(cosine, dtype=np.float64)
    return np.stack([cosine, np.sqrt(1 - cosine**2)], axis=-1)


def embeddings(**parts: object) -> Embeddings:
    no = OmniNFTError("not there")
    names = ("video", "sound", "text_v", "text_a", "frames", "windows")
    return Embeddings(**(dict.fromkeys(names, no) | parts))  # type: ignore[arg-type]


def test_javis_score_is_the_mean_over_windows_of_the_worst_frames() -> None:
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-1, 1, 96)
    starts = (0, 12, 24, 36, 48)
    # 19 = int(0.4 * 48) frames of each window.
    expected = np.mean([np.sort(cosines[s : s + 48])[:19].mean() for s in starts])
    sound = np.tile([3.0, 0.0], (5, 1))  # lengths do not matter
    made = embeddings(frames=7 * at(cosines), windows=sound, frame_starts=starts, frame_count=48)
    assert javis_score(made) == pytest.approx(expected, abs=1e-12)
    short = embeddings(frames=at(np.array([0.5, 0.1])), windows=sound[:1], frame_starts=(0,), frame_count=2)
    assert javis_score(short) == pytest.approx(0.1)  # at least one frame


def test_avh_score_is_the_mean_over_all_frames() -> None:
    cosines = np.array([0.9, -0.3, 0.6])
    assert avh_score(embeddings(frames=at(cosines), sound=np.array([20.0, 0]))) == pytest.approx(0.4)


class Bind:
    """Embeddings known beforehand: pictures at angles, everything else along [1, 0]; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {"videos": 0, "sounds": 0, "texts": 0, "frames": 0}

    def videos(self, items, budget):
        self.asked["videos"] += len(items)
        return np.stack([at(0.6) for _ in items])

    def sounds(self, items, budget):
        assert all(len(views) == 3 for views in items)
        self.asked["sounds"] += len(items)
        return np.stack([at(1.0) * 20 for _ in items])

    def texts(self, texts, budget):
        self.asked["texts"] += len(texts)
        return np.stack([at(0.8) for _ in texts])

    def frames(self, stills, budget):
        self.asked["frames"] += len(stills)
        return at(np.linspace(0, 0.5, len(stills)))


def test_five_metrics_of_one_set_of_embeddings() -> None:
    bind = Bind()
    table = BindScores(scorer=bind, workers=1).score([moving_clip(0, frames=96)])
    found = dict(zip(table.names, table.values[0], strict=True))
    ramp = np.linspace(0, 0.5, 96)
    assert found["tv_ib"] == pytest.approx(0.6 * 0.8 + 0.8 * 0.6)
    assert found["ta_ib"] == pytest.approx(0.8)
    assert found["av_ib"] == pytest.approx(0.6)
    assert found["avh_score"] == pytest.approx(ramp.mean())
    assert found["javis_score"] == pytest.approx(np.mean([ramp[s : s + 19].mean() for s in (0, 12, 24, 36, 48)]))
    assert bind.asked == {"videos": 1, "sounds": 1 + 5, "texts": 2, "frames": 96}


def test_only_what_is_wanted_is_computed() -> None:
    bind = Bind()
    judge = BindScores(wanted=("tv_ib",), scorer=bind, workers=1)
    assert judge.score([moving_clip(0), moving_clip(1)]).names == ("tv_ib",)
    assert bind.asked == {"videos": 2, "sounds": 0, "texts": 2, "frames": 0}


def test_without_sound_or_words_the_rest_is_still_judged() -> None:
    clips = [
        moving_clip(0, frames=60),
        with_sound(moving_clip(1, frames=60), np.zeros((1, 0))),
        moving_clip(2, frames=60, prompt_a=" "),
        moving_clip(3, frames=60),
    ]
    table = BindScores(scorer=Bind(), workers=3).score(clips)
    np.testing.assert_array_equal(table.valid[1], [True, False, False, False, False])
    np.testing.assert_array_equal(table.valid[2], [True, False, True, True, True])
    assert table.valid[[0, 3]].all()
    assert set(table.reasons.values()) == {"the clip has no sound", "needs prompt_a, and the clip has none"}


def test_real_layers_give_the_same_alone_and_in_any_order() -> None:
    scorer = ImageBindScorer(randomise(ImageBind(TINY), scale=0.5), TextTokens(small_tokenizer()))
    clips = [moving_clip(i, frames=n, prompt_v="a cat", prompt_a="cats") for i, n in enumerate((60, 40, 75))]
    together = BindScores(scorer=scorer, workers=2).score(clips).values
    assert np.isfinite(together).all()
    assert together.std(axis=0).min() > 0
    alone = [BindScores(scorer=scorer, workers=1).score([replace(c, views={})]).values[0] for c in clips]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    back = BindScores(scorer=scorer, workers=2).score(clips[::-1]).values
    np.testing.assert_allclose(back[::-1], together, atol=1e-6)


class Ratings:
    """AudioBox of set ratings; keeps the waves."""

    def __call__(self, waves, budget):
        self.waves = waves
        return np.array([[6.0, 5.0, 2.0, 7.0]] * len(waves))


def test_aq_is_the_mean_of_four_axes_over_the_first_4_s() -> None:
    scorer = Ratings()
    short = with_sound(moving_clip(0), np.full(16_000, 0.5), 16_000)
    long = with_sound(moving_clip(1), np.full((2, 5 * 16_000), 0.5), 16_000)
    table = AudioQuality(scorer=scorer).score([short, long])
    assert table.values[:, 0].tolist() == [5.0, 5.0]
    assert [len(w) for w in scorer.waves] == [64_000, 64_000]
    assert scorer.waves[0][15_999] == 0.5
    assert not scorer.waves[0][16_000:].any()


def test_quirk_aq_takes_other_rates_for_16_khz() -> None:
    scorer = Ratings()
    clip = with_sound(moving_clip(0), np.full(48_000, 0.5), 48_000)  # 1 s
    AudioQuality(scorer=scorer).score([clip])
    assert np.flatnonzero(np.abs(scorer.waves[0]) > 0.1).max() == pytest.approx(16_000, abs=60)
    AudioQuality(resample=False, scorer=scorer).score([clip])
    assert np.flatnonzero(scorer.waves[0]).max() == 47_999  # 3 s


class Cosines:
    def __call__(self, *args):
        return np.array([-0.25])


def test_clap_is_the_cosine_itself() -> None:
    assert TextSound(scorer=Cosines()).score([moving_clip(0)]).values.tolist() == [[-0.25]]


def test_quirk_bgr_exchanges_red_and_blue_for_clip_alone() -> None:
    clip = moving_clip(2, frames=4)
    swapped = replace(clip, video=np.ascontiguousarray(clip.video[..., ::-1]), views={})
    plain, quirk = TextVideo(scorer=small_scorer()), TextVideo(scorer=small_scorer(), bgr=True)
    assert quirk.score([clip]).values == pytest.approx(plain.score([swapped]).values, abs=1e-6)
    assert abs(quirk.score([clip]).values - plain.score([clip]).values) > 1e-4
    assert {name: entry.quirks for name, entry in JUDGES.items() if entry.quirks} == {
        "clip": {"bgr_clip": {"bgr": True}},
        "audiobox": {"aq_no_resample": {"resample": False}},
    }


class Offsets:
    def desync(self, inputs, budget):
        self.segments = [item.num_segments for item in inputs]
        return np.array([0.2, 0.6])


def test_desync_is_the_offset_over_4_s() -> None:
    scorer = Offsets()
    judge = DeSync(scorer=scorer)
    clips = [moving_clip(0, frames=96), moving_clip(1, frames=144)]
    assert judge.score(clips).values.tolist() == [[0.2], [0.6]]
    assert scorer.segments == [11, 11]
    (spec,) = judge.components
    assert (spec.higher_is_better, spec.unit, spec.range) == (False, "s", (0.0, 2.0))


class Align:
    """VideoAlign of set raw scores; keeps the rates."""

    def __init__(self) -> None:
        self.rates: list[float | None] = []

    def prepare(self, clip: Clip, text: str, fps: float | None, rounded: bool) -> str:
        self.rates.append(fps)
        return text

    def judge(self, prepared, budget):
        return np.array([[3.0, -1.0, 9.0]] * len(prepared))


def test_vq_and_mq_are_raw_at_the_checkpoints_own_rate() -> None:
    scorer = Align()
    table = VideoQuality(scorer=scorer).score([moving_clip(0)])
    assert (table.names, table.values.tolist()) == (("vq", "mq"), [[3.0, -1.0]])
    assert scorer.rates == [None]
