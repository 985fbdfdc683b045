"""The bounce world: things that sound when they are seen to act, next to things that move in silence.

A clip is 32 x 32 pixels, 25 frames at 12 Hz, with 2.05 s of mono sound at 16 kHz. It shows one sounding source,
either a ball that falls and hits the floor (each hit makes a decaying tone) or a lamp that flashes (each flash makes
a rough buzz), one to three times. In half of the clips a grey square drifts from wall to wall and makes no sound, so
that "which region makes the sound" has a true answer that motion alone does not give.

Events lie on the frame grid, at least `MIN_GAP` frames apart. Carriers are multiples of 100 Hz with a global phase:
with a hop of 10 ms every spectrogram frame then maps to the same waveform cycle, so a very small vocoder suffices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

HEIGHT = WIDTH = 32  # pixels
NUM_FRAMES = 25
FRAME_RATE = 12.0  # Hz
SAMPLE_RATE = 16_000  # Hz
NUM_SAMPLES = 32_800  # 205 hops of 10 ms

KINDS = ("ball", "lamp")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.18, 0.16),
    "green": (0.20, 0.80, 0.25),
    "blue": (0.22, 0.42, 0.98),
    "yellow": (0.95, 0.86, 0.18),
}
# Fundamental in Hz of each pitch, by kind; all multiples of 100 Hz.
PITCHES: dict[str, dict[str, float]] = {
    "ball": {"low": 400.0, "mid": 800.0, "high": 1600.0},
    "lamp": {"low": 200.0, "mid": 500.0, "high": 1200.0},
}
# Relative amplitude of the harmonics 1, 2, 3: a ball rings as a pure tone, a lamp buzzes.
HARMONICS: dict[str, tuple[float, ...]] = {"ball": (1.0,), "lamp": (1.0, 0.7, 0.5)}
COUNTS = (1, 2, 3)

BACKGROUND = 0.07
FLOOR_TOP = 28  # first pixel row of the floor
FLOOR = 0.32
BALL_RADIUS = 3.2  # pixels
BALL_REST = FLOOR_TOP - BALL_RADIUS  # centre height at contact, pixels from the top
GRAVITY = 0.6  # pixels / frame^2
LAMP_RADIUS = 4.0
LAMP_Y = 11.0
LAMP_OFF = 0.28  # brightness of an unlit lamp
LAMP_DECAY = (1.0, 0.75, 0.55, 0.4)  # brightness of the frames from a flash on, before it is off again
SQUARE = 5.0  # side of the silent square, pixels
SQUARE_GREY = 0.62
MIN_GAP = 7  # frames
ATTACK = 0.003  # s
TONE_DECAY = 0.12  # s
BUZZ_HOLD, BUZZ_RELEASE = 0.12, 0.025  # s
AMPLITUDE = 0.55


@dataclass(frozen=True)
class Scene:
    """Exact description of one clip. Frames and pixels for what is seen, seconds for what is heard."""

    kind: str
    colour: str
    pitch: str
    events: tuple[int, ...]  # frames of the hits or flashes
    sound_times: tuple[float, ...]  # s; equal to events / FRAME_RATE unless the sound was put out of time
    x: float  # centre of the source
    lead: int  # ball: frames between a virtual hit before the clip and the first hit
    trail: int  # ball: frames between the last hit and a virtual hit after the clip
    square: tuple[float, float, float] | None = None  # x at frame 0, speed in pixels / frame, y of the silent square

    @property
    def count(self) -> int:
        return len(self.events)

    @property
    def event_times(self) -> tuple[float, ...]:
        """Seconds."""
        return tuple(f / FRAME_RATE for f in self.events)

    @property
    def attributes(self) -> tuple[str, str, str, int, bool]:
        return (self.kind, self.colour, self.pitch, self.count, self.square is not None)


def all_attributes() -> list[tuple[str, str, str, int, bool]]:
    """Every combination of (kind, colour, pitch, count, silent square), in a fixed order: 144."""
    return [
        (kind, colour, pitch, count, square)
        for kind in KINDS
        for colour in COLOURS
        for pitch in ("low", "mid", "high")
        for count in COUNTS
        for square in (False, True)
    ]


def sample_scene(rng: np.random.Generator, attributes: tuple[str, str, str, int, bool]) -> Scene:
    """A scene with the given attributes; timing, places and the square's path are drawn."""
    kind, colour, pitch, count, has_square = attributes
    events = _sample_events(rng, count, kind)
    lead = int(rng.integers(max(events[0] + 1, MIN_GAP), 18)) if kind == "ball" else 0
    trail = int(rng.integers(max(NUM_FRAMES + 1 - events[-1], MIN_GAP), 18)) if kind == "ball" else 0
    square = None
    if has_square:
        speed = float(rng.uniform(0.7, 1.5)) * (1 if rng.random() < 0.5 else -1)
        square = (float(rng.uniform(3, WIDTH - 3)), speed, float(rng.uniform(4, 21)))
    times = tuple(f / FRAME_RATE for f in events)
    return Scene(kind, colour, pitch, events, times, float(rng.uniform(6, WIDTH - 6)), lead, trail, square)


def _sample_events(rng: np.random.Generator, count: int, kind: str) -> tuple[int, ...]:
    """Event frames at least MIN_GAP apart; a ball can stay in the air for 17 frames at most."""
    first, last = 2, 21
    longest = 16 if kind == "ball" else NUM_FRAMES
    while True:
        events = sorted(int(f) for f in rng.choice(np.arange(first, last + 1), size=count, replace=False))
        gaps = np.diff([*events])
        in_air = events[0] <= longest and NUM_FRAMES - events[-1] <= longest if kind == "ball" else True
        if in_air and (gaps >= MIN_GAP).all() and (gaps <= longest).all():
            return tuple(events)


def ball_heights(scene: Scene) -> np.ndarray:
    """Height of the ball's centre above its place at contact, pixels, per frame [T]; exactly 0 at every event."""
    hits = [scene.events[0] - scene.lead, *scene.events, scene.events[-1] + scene.trail]
    t = np.arange(NUM_FRAMES, dtype=np.float64)
    heights = np.zeros(NUM_FRAMES)
    for a, b in pairwise(hits):
        inside = (t >= a) & (t <= b)
        heights[inside] = 0.5 * GRAVITY * (t[inside] - a) * (b - t[inside])
    return heights


def lamp_levels(events: tuple[int, ...]) -> np.ndarray:
    """Brightness of the lamp per frame [T], LAMP_OFF..1."""
    levels = np.full(NUM_FRAMES, LAMP_OFF)
    for event in events:
        for i, level in enumerate(LAMP_DECAY):
            if event + i < NUM_FRAMES:
                levels[event + i] = level
    return levels


def square_positions(square: tuple[float, float, float]) -> np.ndarray:
    """Centre x of the silent square per frame [T]: it reflects at the walls."""
    x0, speed, _ = square
    low, high = SQUARE / 2, WIDTH - SQUARE / 2
    span = high - low
    phase = (x0 - low + speed * np.arange(NUM_FRAMES)) % (2 * span)
    return low + np.where(phase > span, 2 * span - phase, phase)


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    return y, x


@cache
def backdrop() -> np.ndarray:
    """The empty scene, [H, W, 3] float64 in 0..1."""
    frame = np.full((HEIGHT, WIDTH, 3), BACKGROUND)
    frame[FLOOR_TOP:] = FLOOR
    return frame


def disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Coverage of discs centred at x, y (pixels, any shape S), [*S, H, W] in 0..1."""
    grid_y, grid_x = _grid()
    distance = np.hypot(grid_x - np.asarray(x)[..., None, None], grid_y - np.asarray(y)[..., None, None])
    return np.clip(radius + 0.5 - distance, 0.0, 1.0)


def box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Coverage of axis-aligned boxes centred at x, y, [*S, H, W] in 0..1."""
    grid_y, grid_x = _grid()
    across = np.clip(width / 2 + 0.5 - np.abs(grid_x - np.asarray(x)[..., None, None]), 0.0, 1.0)
    down = np.clip(height / 2 + 0.5 - np.abs(grid_y - np.asarray(y)[..., None, None]), 0.0, 1.0)
    return across * down


def compose(
    source_coverage: np.ndarray,
    source_colour: np.ndarray,
    square_coverage: np.ndarray | None = None,
    stand_coverage: np.ndarray | None = None,
) -> np.ndarray:
    """Paint backdrop, lamp stand, square and source over one another, [T, H, W, 3] float64 in 0..1.

    `source_colour` is [3] or [T, 3]; coverages are [T, H, W].
    """
    frames = np.broadcast_to(backdrop(), (*source_coverage.shape, 3)).copy()
    if stand_coverage is not None:
        frames += stand_coverage[..., None] * (0.4 - frames)
    if square_coverage is not None:
        frames += square_coverage[..., None] * (SQUARE_GREY - frames)
    colour = np.asarray(source_colour)
    colour = colour[:, None, None, :] if colour.ndim == 2 else colour
    frames += source_coverage[..., None] * (colour - frames)
    return frames


def lamp_stand(x: float | np.ndarray) -> np.ndarray:
    """Coverage of the stand under a lamp at x, [*S, H, W]."""
    top = LAMP_Y + LAMP_RADIUS
    return box(
        np.asarray(x), np.full_like(np.asarray(x, dtype=np.float64), (top + FLOOR_TOP) / 2), 1.0, FLOOR_TOP - top
    )


def render_video(scene: Scene) -> np.ndarray:
    """Frames, [T, H, W, 3] uint8."""
    colour = np.asarray(COLOURS[scene.colour])
    xs = np.full(NUM_FRAMES, scene.x)
    square = None
    if scene.square is not None:
        square = box(square_positions(scene.square), np.full(NUM_FRAMES, scene.square[2]), SQUARE, SQUARE)
    if scene.kind == "ball":
        frames = compose(disc(xs, BALL_REST - ball_heights(scene), BALL_RADIUS), colour, square)
    else:
        tint = lamp_levels(scene.events)[:, None] * colour
        frames = compose(disc(xs, np.full(NUM_FRAMES, LAMP_Y), LAMP_RADIUS), tint, square, lamp_stand(xs))
    return np.round(frames * 255).astype(np.uint8)


@cache
def carrier(kind: str, pitch: str) -> np.ndarray:
    """The endless sound of a source, [N] in -1..1: a sine for a ball, a rough harmonic buzz for a lamp."""
    t = np.arange(NUM_SAMPLES) / SAMPLE_RATE
    wave = sum(a * np.sin(2 * np.pi * PITCHES[kind][pitch] * (i + 1) * t) for i, a in enumerate(HARMONICS[kind]))
    if kind == "lamp":
        wave = wave * (0.5 + 0.5 * np.cos(2 * np.pi * 100 * t)) / sum(HARMONICS[kind])
    return np.asarray(wave)


def envelope(kind: str, sound_times: tuple[float, ...]) -> np.ndarray:
    """Amplitude over time of the events' sounds, [N]; overlapping sounds take the larger amplitude."""
    t = np.arange(NUM_SAMPLES) / SAMPLE_RATE
    total = np.zeros(NUM_SAMPLES)
    for start in sound_times:
        s = t - start
        attack = np.clip(s / ATTACK, 0.0, 1.0)
        if kind == "ball":
            body = np.exp(-np.maximum(s, 0) / TONE_DECAY)
        else:
            body = np.exp(-np.maximum(s - BUZZ_HOLD, 0) / BUZZ_RELEASE)
        total = np.maximum(total, attack * body)
    return total


def render_audio(scene: Scene) -> np.ndarray:
    """Waveform, [N] float32 in -1..1."""
    wave = AMPLITUDE * envelope(scene.kind, scene.sound_times) * carrier(scene.kind, scene.pitch)
    return wave.astype(np.float32)


def source_mask(scene: Scene) -> np.ndarray:
    """Coverage of what sounds, [T, H, W] in 0..1: the truth about which region makes the sound."""
    xs = np.full(NUM_FRAMES, scene.x)
    if scene.kind == "ball":
        return disc(xs, BALL_REST - ball_heights(scene), BALL_RADIUS)
    return disc(xs, np.full(NUM_FRAMES, LAMP_Y), LAMP_RADIUS)
