"""The reward of the bounce world: five numbers in 0..1, each measured, none learned.

Every formula is continuous in what was measured: the samples of one prompt differ, and a slightly better clip has a
slightly better score. A part of a prompt that is not about this world is not judged; a prompt with no such part, a
clip without sound or of another size is missing in the components concerned, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from omninft.rewards.formulas import score_table
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.weights import JudgingModel
from omninft.scorers.world_sound import sound_facts
from omninft.scorers.world_video import video_facts
from omninft.types import Clip, OmniNFTError, Prompt, ScoreTable
from omninft.worlds.wording import read_request

ERROR_SCALE = 0.11  # rmse of a frame, 0..1, that halves its quality
COUNT_SCALE = 0.5  # events too many or too few that halve the score of a count
ENVELOPE_SCALE = 2.0  # dB of error of the level over time that halve its score
IMPURITY_MIDDLE, IMPURITY_SCALE = -8.0, 3.7  # dB of the power off the source's lines against all power
FLOOR_MIDDLE, FLOOR_SCALE = -40.0, 6.0  # dBFS
CLIPPING_SCALE = 0.01  # share of clipped samples that halves the score of clipping
CERTAIN = 0.5  # strength from which an event counts as there
OFFSET_SCALE = 0.1  # s over which synchrony falls to 1/e
OFFSET_ROUND = 0.003  # s below which offsets are not told apart: the accuracy of the measurement


def video_quality(clip: Clip) -> float:
    """Mean over frames of how well the scene rendered again from the estimates explains them.

    The world's scene has a source: the empty backdrop is well explained and yet no clip of it.
    """
    facts = video_facts(clip)
    explained = 1 / (1 + (facts.errors / ERROR_SCALE) ** 2.5)
    return float(explained.mean()) * smoothstep(facts.presence / 0.6)


def video_text(clip: Clip) -> float:
    """Colour 3, kind 2, count 3, square there or not as asked 4; of what prompt_v says, by weight.

    Raises OmniNFTError when prompt_v names no kind, colour or count of this world.
    """
    request, facts = read_request(clip.prompt.prompt_v, clip.prompt.prompt_a), video_facts(clip)
    parts = []
    if request.colour is not None:
        parts.append((3.0, facts.colours[request.colour]))
    if request.kind is not None:
        parts.append((2.0, facts.kinds[request.kind]))
    if request.count is not None:
        parts.append((3.0, count_match(float(facts.event_strengths.sum()), request.count)))
    if not parts:
        raise OmniNFTError(_asks_nothing("prompt_v", clip.prompt.prompt_v))
    square = facts.square
    # The absence of a square is worth nothing in a picture that shows nothing.
    parts.append((4.0, square if request.square else (1 - square) * smoothstep(facts.presence / 0.7)))
    return _weighted_mean(parts)


def audio_quality(clip: Clip) -> float:
    """Level over time as the world's sounds have it 4, purity 3, quiet between sounds 2, no clipping 1; 0 for silence.

    Purity and quiet are soon had; the level over time is what still tells good sounds from better ones.
    """
    facts = sound_facts(clip)
    impurity = 10 * np.log10(max(1 - facts.purity, 1e-9))
    return facts.heard * _weighted_mean(
        [
            (4.0, 1 / (1 + facts.envelope_error / ENVELOPE_SCALE)),
            (3.0, _falling(impurity, IMPURITY_MIDDLE, IMPURITY_SCALE)),
            (2.0, _falling(facts.noise_floor, FLOOR_MIDDLE, FLOOR_SCALE)),
            (1.0, 1 / (1 + facts.clipping / CLIPPING_SCALE)),
        ]
    )


def audio_text(clip: Clip) -> float:
    """Pitch 3, kind of sound 2, count 3; of what prompt_a says, by weight.

    Raises OmniNFTError when prompt_a names no sound, pitch or count of this world.
    """
    request, facts = read_request(clip.prompt.prompt_v, clip.prompt.prompt_a), sound_facts(clip)
    parts = []
    if request.pitch is not None:
        parts.append((3.0, facts.pitches[request.pitch]))
    if request.sound_kind is not None:
        parts.append((2.0, facts.kinds[request.sound_kind]))
    if request.sound_count is not None:
        parts.append((3.0, count_match(float(facts.onset_strengths.sum()), request.sound_count)))
    if not parts:
        raise OmniNFTError(_asks_nothing("prompt_a", clip.prompt.prompt_a))
    return _weighted_mean(parts)


def certain_events(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Times in seconds of the events that are certainly seen and of those certainly heard: those that are counted."""
    seen, heard = video_facts(clip), sound_facts(clip)
    return (
        seen.event_times[seen.event_strengths >= CERTAIN],
        heard.onset_times[heard.onset_strengths >= CERTAIN],
    )


def _asks_nothing(field: str, text: str) -> str:
    return f"{field} asks for nothing of the bounce world: {text!r}"


def sync(clip: Clip) -> float:
    """How well every event seen has its sound, and every sound its event; 0 where there is neither."""
    seen, heard = video_facts(clip), sound_facts(clip)
    # What the report marks under the player. Faint ones weigh here by their strength, but no count counts them.
    clip.views["events"] = {name: t.tolist() for name, t in zip(("video", "audio"), certain_events(clip), strict=True)}
    return synchrony(seen.event_times, seen.event_strengths, heard.onset_times, heard.onset_strengths)


def synchrony(
    event_times: np.ndarray, event_strengths: np.ndarray, onset_times: np.ndarray, onset_strengths: np.ndarray
) -> float:
    """Best one-to-one matching of events [E] and onsets [F], seconds and strengths in 0..1; a score in 0..1.

    A pair gives the smaller strength times a kernel of its offset; the sum is divided by the larger of the two sums
    of strengths, so that what is left over on either side counts as 0. That sum is taken as one event at least: faint
    things that happen to coincide are not a synchronous clip.
    """
    if not len(event_times) or not len(onset_times):
        return 0.0
    gains = np.minimum(event_strengths[:, None], onset_strengths) * offset_kernel(event_times[:, None] - onset_times)
    rows, columns = linear_sum_assignment(gains, maximize=True)
    return float(gains[rows, columns].sum() / max(event_strengths.sum(), onset_strengths.sum(), 1.0))


def offset_kernel(offset: np.ndarray) -> np.ndarray:
    """1 at an offset of 0 s, falling as exp(-|offset| / OFFSET_SCALE), round within OFFSET_ROUND."""
    return np.asarray(np.exp(-(np.hypot(offset, OFFSET_ROUND) - OFFSET_ROUND) / OFFSET_SCALE))


def count_match(found: float, asked: int) -> float:
    """1 where the strengths of the events add up to the number asked for, 1/2 at COUNT_SCALE from it."""
    return 1 / (1 + ((found - asked) / COUNT_SCALE) ** 2)


def smoothstep(x: float) -> float:
    """0 up to x = 0, 1 from x = 1, smooth between."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def _falling(x: float, middle: float, scale: float) -> float:
    return float(1 / (1 + np.exp((x - middle) / scale)))


def _weighted_mean(parts: Sequence[tuple[float, float]]) -> float:
    return sum(w * s for w, s in parts) / sum(w for w, _ in parts)


class WorldReward:
    """Trained on the bundled model."""

    name = "world"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec("video_quality", "video", "frames explained by the world's scene rendered from the estimates"),
        ComponentSpec("video_text", "video", "colour, kind, count and silent square as prompt_v asks"),
        ComponentSpec("audio_quality", "audio", "level over time, purity, quiet between the sounds, no clipping"),
        ComponentSpec("audio_text", "audio", "pitch, kind of sound and count as prompt_a asks"),
        ComponentSpec("sync", "joint", "every event has its sound in time, and every sound its event"),
    )
    inputs: tuple[Input, ...] = ("video", "audio", "prompt_v", "prompt_a")
    licence = "this package's"
    model: JudgingModel | None = None

    def judges(self, prompt: Prompt, components: Sequence[str]) -> str | None:
        """Why video_text or audio_text, where they are among the components, would be missing; None if they are not."""
        asked = read_request(prompt.prompt_v, prompt.prompt_a)
        if "video_text" in components and asked.kind is asked.colour is asked.count is None:
            return _asks_nothing("prompt_v", prompt.prompt_v)
        if "audio_text" in components and asked.pitch is asked.sound_kind is asked.sound_count is None:
            return _asks_nothing("prompt_a", prompt.prompt_a)
        return None

    def score(self, clips: list[Clip]) -> ScoreTable:
        """[B, 5] in 0..1."""
        formulas = (video_quality, video_text, audio_quality, audio_text, sync)
        return score_table(self.components, formulas, clips)
