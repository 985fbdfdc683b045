"""What a clip of the bounce world shows, measured from its pixels by analysis and synthesis.

The source is found by its chroma. Everything else in the world is grey, so the chroma of a pixel divided by the
chroma of the source's colour is the source's coverage there times its brightness, whatever lies behind it. From that
map come the colour, the path of a ball, the brightness of a lamp and the events; the silent square is looked for in
what is left. The scene is then rendered again from these estimates and compared with the frames.

Estimates are opacities and projections rather than decisions, so that a ghost of half the strength counts half and
scores move when a clip gets a little better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from omninft.types import Clip, OmniNFTError
from omninft.worlds import bounce

SHAPE = (bounce.NUM_FRAMES, bounce.HEIGHT, bounce.WIDTH, 3)

# Orthonormal basis of the plane of colours without grey.
_CHROMA = np.array([[1, -1, 0], [1, 1, -2]], dtype=np.float32) / np.sqrt(np.array([[2], [6]], dtype=np.float32))
_COLOURS = np.array(list(bounce.COLOURS.values()), dtype=np.float32)  # [4, 3]
_HUES = _COLOURS @ _CHROMA.T  # [4, 2]
_HUE_REACH = 52.0  # degrees from a hue at which a pixel is no evidence for it; red and yellow are that far apart
_CHROMA_FLOOR = 0.015  # chroma that counts as no colour at all, 0..1
_REFINE = 5  # pixels around a peak that take part in a centroid
_ANCHOR = 4.0  # pixels by which a source may well leave its column
_JERK_SLACK = 0.8  # pixels / frame^2 by which a free flight may depart from its parabola
_JERK_FULL = 2.8  # pixels / frame^2 beyond the slack that make a whole bounce; the weakest of the world has 3.4
_SPAN = bounce.WIDTH - bounce.SQUARE  # pixels a square travels from wall to wall
_SQUARE_ROWS = slice(3, 23)  # pixel rows a square's centre may lie in
# Grey a square adds to a frame, summed over its pixels, and a quarter more for one that is not quite sharp.
_SQUARE_MASS = 1.25 * bounce.SQUARE**2 * (bounce.SQUARE_GREY - bounce.BACKGROUND)
_NEGLIGIBLE = 0.01  # evidence for a kind that is not worth a rendering
_OBJECT_WEIGHT = 6.0  # objects cover few pixels: without it the backdrop alone decides the error


@dataclass(frozen=True)
class VideoFacts:
    """Measurements of one clip's frames. Times in seconds, places in pixels from the top left, shares in 0..1."""

    colours: dict[str, float]  # evidence for each colour of the source, adds up to at most 1
    kinds: dict[str, float]  # evidence for ball and lamp, adds up to `presence`
    presence: float  # opacity of the source against the best rendering
    track: np.ndarray  # [T, 2] x, y of the source's centre if it is a ball
    levels: np.ndarray  # [T] brightness of the source if it is a lamp
    square: float  # opacity of the silent square along its best path
    square_track: np.ndarray  # [T, 2] that path; meaningless where `square` is near 0
    event_times: np.ndarray  # [E] s, rising
    event_strengths: np.ndarray  # [E] in 0..1
    errors: np.ndarray  # [T] root of the mean squared error against the scene rendered again, in 0..1
    sharpness: float  # slope of the source's edges relative to the rendered ones: 1 as rendered, 0 none

    @property
    def colour(self) -> str:
        return max(self.colours, key=self.colours.__getitem__)

    @property
    def kind(self) -> str:
        return max(self.kinds, key=self.kinds.__getitem__)


def video_facts(clip: Clip) -> VideoFacts:
    """Measure the frames of a clip, once.

    Frames that were enlarged by a whole factor are brought back to size first.

    Raises OmniNFTError for frames that are not uint8 [25, 32, 32, 3] (or enlarged) at 12 Hz.
    """
    facts: VideoFacts = clip.view("world_video", _measure)
    return facts


def _at_world_size(frames: np.ndarray) -> np.ndarray:
    """Frames that were enlarged by a whole factor for viewing, back at the world's size by block means."""
    factor = frames.shape[1] // bounce.HEIGHT if frames.ndim == 4 else 1
    if factor < 2 or frames.dtype != np.uint8 or frames.shape[1:3] != (factor * bounce.HEIGHT, factor * bounce.WIDTH):
        return frames
    blocks = frames.reshape(len(frames), bounce.HEIGHT, factor, bounce.WIDTH, factor, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def _measure(clip: Clip) -> VideoFacts:
    frames = _at_world_size(np.asarray(clip.video))
    if frames.shape != SHAPE or frames.dtype != np.uint8:
        raise OmniNFTError(
            f"the bounce world's video is uint8 {list(SHAPE)}, found {frames.dtype} {list(frames.shape)}"
        )
    if abs(clip.frame_rate - bounce.FRAME_RATE) > 1e-3:
        raise OmniNFTError(f"the bounce world's frame rate is {bounce.FRAME_RATE:g} Hz, found {clip.frame_rate:g}")
    pixels = frames.astype(np.float32) / 255
    red, green, blue = np.moveaxis(pixels, -1, 0)
    # Coordinates in the plane of colours without grey, [2, T, H, W].
    chroma = np.stack([(red - green) * np.float32(2**-0.5), (red + green - 2 * blue) * np.float32(6**-0.5)])
    mean_chroma = _disc_mean(chroma)
    colours = _colour_evidence(mean_chroma)
    # One colour as a rule; where two compete, both readings count, so that nothing jumps as one overtakes the other.
    weights = (colours + 1e-6) ** 2
    weights /= weights.sum()
    likely = [i for i in np.argsort(weights)[-2:] if weights[i] > _NEGLIGIBLE]
    readings = [(float(weights[i]), _read(pixels, chroma, mean_chroma, int(i))) for i in likely]
    presence = _average([(w, r.presence) for w, r in readings])
    as_ball = _average([(w, r.as_ball) for w, r in readings])
    times, strengths = _merged([(t, w * s) for w, r in readings for t, s in r.events])
    main = max(readings, key=lambda pair: pair[0])[1]
    shown = float(_smoothstep(presence / 0.7))
    return VideoFacts(
        colours=dict(zip(bounce.COLOURS, (colours * shown).tolist(), strict=True)),
        kinds={"ball": as_ball * shown, "lamp": (1 - as_ball) * shown},
        presence=presence,
        track=main.track,
        levels=main.levels,
        square=_average([(w, r.square) for w, r in readings]),
        square_track=main.square_track,
        event_times=times,
        event_strengths=strengths,
        errors=np.asarray(_average([(w, r.errors) for w, r in readings])),
        sharpness=_average([(w, r.sharpness) for w, r in readings]),
    )


@dataclass(frozen=True)
class _Reading:
    """What the frames show if the source has a given colour; fields as in `VideoFacts`."""

    as_ball: float  # 0 lamp, 1 ball
    presence: float
    track: np.ndarray
    levels: np.ndarray
    square: float
    square_track: np.ndarray
    events: list[tuple[float, float]]  # frame, strength
    errors: np.ndarray
    sharpness: float


def _read(pixels: np.ndarray, chroma: np.ndarray, mean_chroma: np.ndarray, index: int) -> _Reading:
    """Track a source of colour number `index`, tell ball from lamp, and render the scene again."""
    colour, hue = _COLOURS[index], _HUES[index] / np.square(_HUES[index]).sum()
    source = _project(hue, chroma)  # [T, H, W] coverage times brightness
    x, track, visible = _track(source, _project(hue, mean_chroma))
    ball = bounce.disc(track[:, 0], track[:, 1], bounce.BALL_RADIUS).astype(np.float32)
    lamp = bounce.disc(np.array(x), np.array(bounce.LAMP_Y), bounce.LAMP_RADIUS).astype(np.float32)
    brightness = np.tensordot(source, lamp, 2) / np.square(lamp).sum()  # [T]
    levels = np.clip(brightness, bounce.LAMP_OFF, 1.0)
    as_ball = _ball_evidence(source, ball, lamp, brightness)
    looks = []
    if as_ball > _NEGLIGIBLE:
        looks.append((as_ball, _look(pixels, source, colour, ball, None, None)))
    if 1 - as_ball > _NEGLIGIBLE:
        lamps = np.broadcast_to(lamp, source.shape)
        looks.append((1 - as_ball, _look(pixels, source, colour, lamps, levels, bounce.lamp_stand(x))))
    contacts = _contacts(bounce.BALL_REST - track[:, 1], visible)
    flashes = _flashes(levels)
    return _Reading(
        as_ball=as_ball,
        presence=_average([(w, look.presence) for w, look in looks]),
        track=track,
        levels=levels,
        square=_average([(w, look.square) for w, look in looks]),
        square_track=max(looks, key=lambda pair: pair[0])[1].square_track,
        events=[(t, s * as_ball) for t, s in contacts] + [(t, s * (1 - as_ball)) for t, s in flashes],
        errors=_average([(w, look.errors) for w, look in looks]),
        sharpness=_average([(w, look.sharpness) for w, look in looks]),
    )


@dataclass(frozen=True)
class _Look:
    """The frames as those of one kind of source; fields as in `VideoFacts`."""

    presence: float
    square: float
    square_track: np.ndarray
    errors: np.ndarray
    sharpness: float


def _look(
    pixels: np.ndarray,
    source: np.ndarray,
    colour: np.ndarray,
    coverage: np.ndarray,
    levels: np.ndarray | None,
    stand: np.ndarray | None,
) -> _Look:
    """Render the scene with a source of this colour [3], coverage [T, H, W] and brightness [T], and compare.

    `pixels` [T, H, W, 3]; `source` [T, H, W] is the brightness times coverage that was found.
    """
    painted = coverage if levels is None else levels[:, None, None].astype(np.float32) * coverage
    backdrop = bounce.compose(np.zeros((1, bounce.HEIGHT, bounce.WIDTH)), np.zeros(3), stand_coverage=stand)[0]
    # What is grey, black where the source hides it.
    rest = np.stack([pixels[..., i] - colour[i] * source for i in range(3)])
    square, square_track = _find_square(rest, coverage, np.moveaxis(backdrop, -1, 0).astype(np.float32))
    tint = colour if levels is None else levels[:, None] * colour
    return _Look(
        presence=_opacity(source, np.zeros_like(painted), painted),
        square=square,
        square_track=square_track,
        errors=_errors(pixels, bounce.compose(coverage, tint, None, stand), coverage),
        sharpness=_edge_slope(source, painted),
    )


def _average(pairs: list[tuple[float, Any]]) -> Any:
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


def _ball_evidence(source: np.ndarray, ball: np.ndarray, lamp: np.ndarray, brightness: np.ndarray) -> float:
    """0 for a lamp, 1 for a ball: where the source lies between its best ball and its best lamp.

    Both are fitted with free opacity, so that a faint ball is not taken for an unlit lamp.
    """
    best_ball = _opacity(source, np.zeros_like(ball), ball) * ball
    best_lamp = np.maximum(brightness, 0.0).astype(np.float32)[:, None, None] * lamp
    # Either fit takes some of the other's pixels: the middle of the way decides.
    return float(_smoothstep((_opacity(source, best_lamp, best_ball) - 0.2) / 0.6))


@cache
def _disc_kernel() -> np.ndarray:
    """Mean over a ball's disc, [9, 9] float32."""
    y, x = np.mgrid[-4:5, -4:5]
    kernel = np.clip(bounce.BALL_RADIUS + 0.5 - np.hypot(x, y), 0.0, 1.0)
    return (kernel / kernel.sum()).astype(np.float32)


def _tall(maps: np.ndarray) -> np.ndarray:
    """Maps [..., H, W] under one another with gaps of zeros, [..., H + 4, W]: filtered as one picture."""
    tall = np.zeros((*maps.shape[:-2], bounce.HEIGHT + 4, bounce.WIDTH), np.float32)
    tall[..., : bounce.HEIGHT, :] = maps
    return tall


def _disc_mean(maps: np.ndarray) -> np.ndarray:
    """Mean of [..., H, W] over a ball's disc around every pixel; zeros outside."""
    tall = _tall(maps)
    made = cv2.filter2D(tall.reshape(-1, bounce.WIDTH), -1, _disc_kernel(), borderType=cv2.BORDER_CONSTANT)
    return made.reshape(tall.shape)[..., : bounce.HEIGHT, :]


def _box_mean(maps: np.ndarray) -> np.ndarray:
    """Mean of [..., H, W] over a square around every pixel; zeros outside."""
    tall = _tall(maps)
    side = int(bounce.SQUARE)
    made = cv2.blur(tall.reshape(-1, bounce.WIDTH), (side, side), borderType=cv2.BORDER_CONSTANT)
    return made.reshape(tall.shape)[..., : bounce.HEIGHT, :]


def _smoothstep(x: float | np.ndarray) -> np.ndarray:
    """0 up to x = 0, 1 from x = 1, smooth between."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3 - 2 * x)


def _opacity(found: np.ndarray, without: np.ndarray, whole: np.ndarray) -> float:
    """How far `found` lies on the way from `without` (0) to `whole` (1): its projection, clipped."""
    step = (whole - without).ravel()
    return float(np.clip(step @ (found - without).ravel() / max(float(step @ step), 1e-9), 0.0, 1.0))


def _project(weights: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Weighted sum of two planes."""
    return np.asarray(weights[0] * planes[0] + weights[1] * planes[1])


def _colour_evidence(mean_chroma: np.ndarray) -> np.ndarray:
    """Share of each colour in the strongest disc of every frame, [4]; adds up to less than 1 where all is pale."""
    strength = np.hypot(*mean_chroma)
    reach = np.cos(np.deg2rad(_HUE_REACH))
    directions = _HUES / np.linalg.norm(_HUES, axis=1, keepdims=True)
    peaks = []
    for direction in directions:
        inside = (_project(direction, mean_chroma) - reach * strength) / (1 - reach)
        peaks.append(inside.reshape(len(strength), -1).max(1))
    energy = np.square(np.maximum(peaks, 0.0)).sum(1)
    return np.asarray(energy / (energy.sum() + len(strength) * _CHROMA_FLOOR**2))


def _track(source: np.ndarray, response: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Column of the source, its centre per frame [T, 2] (x, y), and how visible it is there [T], 0..1."""
    columns = np.square(np.clip(response.max(1), 0.0, 1.0)).sum(0)  # [W]
    at = int(np.argmax(columns))
    prior = np.exp(-0.5 * np.square((np.arange(bounce.WIDTH) - at) / _ANCHOR)).astype(np.float32)
    flat = (response * prior).reshape(len(response), -1)
    best = np.argmax(flat, 1)
    row, column = np.divmod(best, bounce.WIDTH)
    pad = _REFINE + 1
    padded = np.pad(np.clip(source, 0.0, 1.0), ((0, 0), (pad, pad), (pad, pad)))
    offsets = np.arange(-_REFINE, _REFINE + 1)
    for _ in range(2):
        rows = row[:, None, None] + pad + offsets[:, None]
        cols = column[:, None, None] + pad + offsets
        patch = padded[np.arange(len(row))[:, None, None], rows, cols]
        mass = np.maximum(patch.sum((1, 2)), 1e-3)
        y = row + 0.5 + (patch.sum(2) @ offsets) / mass
        x = column + 0.5 + (patch.sum(1) @ offsets) / mass
        row = np.clip(np.floor(y), 0, bounce.HEIGHT - 1).astype(int)
        column = np.clip(np.floor(x), 0, bounce.WIDTH - 1).astype(int)
    visible = np.clip(np.take_along_axis(flat, best[:, None], 1)[:, 0], 0.0, 1.0)
    weight = visible + 1e-6
    middle = float((x * weight).sum() / weight.sum())
    return middle, np.stack([x, y], 1), visible


def _merged(events: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(frame, strength) of every reading to times (s) and strengths; what is seen twice becomes one event."""
    merged: list[tuple[float, float]] = []
    for at, strength in sorted(events):
        if merged and at - merged[-1][0] < bounce.MIN_GAP / 2:
            before, weight = merged.pop()
            total = max(weight + strength, 1e-9)
            at, strength = (before * weight + at * strength) / total, min(total, 1.0)
        merged.append((at, strength))
    kept = [(at, strength) for at, strength in merged if strength > 0.01]
    return np.array([at / bounce.FRAME_RATE for at, _ in kept]), np.array([strength for _, strength in kept])


def _contacts(heights: np.ndarray, visible: np.ndarray) -> list[tuple[float, float]]:
    """(frame, strength) of every kink of a falling ball's path that lies at the floor.

    A flight has the second difference -GRAVITY; a contact adds an impulse of at least 4.2 pixels / frame^2, which two
    neighbouring frames share in proportion where the contact lies between them.
    """
    impulses = np.zeros(len(heights))
    impulses[1:-1] = np.maximum(np.diff(heights, 2) + bounce.GRAVITY - _JERK_SLACK, 0.0)
    found = []
    for at, total in _gather(impulses):
        frame = int(at)
        part = at - frame
        before, after = heights[frame], heights[min(frame + 1, len(heights) - 1)]
        lowest = (1 - part) * before + part * after - (total + _JERK_SLACK) * part * (1 - part)
        at_floor = 1 / (1 + (max(abs(lowest) - 0.5, 0.0) / 1.5) ** 2)
        seen = visible[max(frame - 1, 0) : frame + 3].mean()
        strength = at_floor * _smoothstep(total / _JERK_FULL) * _smoothstep(seen / 0.6)
        found.append((at, float(strength)))
    return found


def _flashes(levels: np.ndarray) -> list[tuple[float, float]]:
    """(frame, strength) of the flashes whose decays add up to the lamp's brightness.

    The decay's inverse filter turns brightness into one impulse a flash; a flash smeared over two frames gives two,
    which belong together.
    """
    decay = np.array(bounce.LAMP_DECAY) - bounce.LAMP_OFF
    rest = (levels - bounce.LAMP_OFF).astype(np.float64)
    impulses = np.zeros(len(levels))
    for t in range(len(levels)):
        impulses[t] = max(rest[t] / decay[0], 0.0)
        n = min(len(decay), len(levels) - t)
        rest[t : t + n] -= impulses[t] * decay[:n]
    impulses = np.maximum(impulses - 0.08, 0.0) / 0.92
    return [(at, float(_smoothstep(total / 0.9))) for at, total in _gather(impulses)]


def _gather(impulses: np.ndarray) -> list[tuple[float, float]]:
    """(frame, sum) of clusters of impulses: each local maximum with its two neighbours."""
    found = []
    padded = np.concatenate([[0.0, 0.0], impulses, [0.0, 0.0]])
    for t in np.flatnonzero(impulses):
        window = padded[t : t + 5]
        if window[2] < window.max() or (window[2] == window[:2].max()):
            continue
        near = window[1:4]
        total = float(near.sum())
        found.append((float(t + (near[2] - near[0]) / total), total))
    return found


@cache
def _paths() -> tuple[np.ndarray, np.ndarray]:
    """Paths of squares on a coarse grid: (phase, speed) [P, 2], and where they run in a flat [T, W] map, [P, T]."""
    phases, speeds = np.meshgrid(np.arange(0, 2 * _SPAN), np.arange(0.6, 1.65, 0.1), indexing="ij")
    settings = np.stack([phases.ravel(), speeds.ravel()], 1)
    frames = np.arange(bounce.NUM_FRAMES) * bounce.WIDTH
    return settings, frames + _path(settings).astype(int)


def _path(settings: np.ndarray) -> np.ndarray:
    """Centre x per frame [P, T] of squares with (phase, speed) [P, 2]: unfolded pixels and pixels / frame."""
    phase = (settings[:, :1] + settings[:, 1:] * np.arange(bounce.NUM_FRAMES)) % (2 * _SPAN)
    return np.asarray(bounce.SQUARE / 2 + np.minimum(phase, 2 * _SPAN - phase))


def _extent(centres: np.ndarray, size: int) -> np.ndarray:
    """Coverage along one axis of `size` pixels of squares at `centres` [*S], [*S, size]."""
    distance = np.abs(np.arange(size) + 0.5 - np.asarray(centres)[..., None])
    return np.clip(bounce.SQUARE / 2 + 0.5 - distance, 0.0, 1.0).astype(np.float32)


def _find_square(rest: np.ndarray, hidden: np.ndarray, backdrop: np.ndarray) -> tuple[float, np.ndarray]:
    """Opacity (0..1) of a grey square on the best path from wall to wall, and the path [T, 2].

    `rest` [3, T, H, W] is black where the source, whose coverage is `hidden` [T, H, W], lies in front.
    """
    free = (1 - hidden).astype(np.float32)
    contrast = free * (bounce.SQUARE_GREY - backdrop[0])
    # A square is grey: the weakest channel of the mean over its area counts, so that coloured ghosts do not.
    lifts = [plane - free * behind for plane, behind in zip(rest, backdrop, strict=True)]
    means = [_box_mean(lift) for lift in lifts]
    most = np.maximum(_box_mean(contrast), 0.1)
    match = np.clip(np.minimum(np.minimum(means[0], means[1]), means[2]) / most, 0.0, 1.0) * _box_mean(free)
    row = int(np.argmax(np.square(match[:, _SQUARE_ROWS].max(2)).sum(0))) + _SQUARE_ROWS.start
    settings, places = _paths()
    setting = settings[int(np.argmax(np.take(match[:, row], places).sum(1)))]
    lift = (lifts[0] + lifts[1] + lifts[2]) / 3
    y = row + 0.5
    for step in (0.3, 0.1, 0.03):
        down = _extent(np.array(y), bounce.HEIGHT)
        setting = _fit_path(down @ lift, down @ (contrast * down[:, None]), setting, step)
        across = _extent(_path(setting[None])[0], bounce.WIDTH)  # [T, W]
        heights = y + np.arange(-4, 5) * step
        seen, most_seen = np.einsum("tyx,tx->ty", lift, across), np.einsum("tyx,tx->ty", contrast, across**2)
        trial = _extent(heights, bounce.HEIGHT)[:, None]  # [9, 1, H]
        y = float(heights[int(np.argmin(np.square(seen - most_seen * trial).sum((1, 2))))])
    x = _path(setting[None])[0]
    track = np.stack([x, np.full_like(x, y)], 1)
    whole = contrast * _extent(np.array(y), bounce.HEIGHT)[:, None] * _extent(x, bounce.WIDTH)[:, None, :]
    return _opacity(lift, np.zeros_like(whole), whole), track


def _fit_path(seen: np.ndarray, most: np.ndarray, setting: np.ndarray, step: float) -> np.ndarray:
    """The (phase, speed) near `setting` whose square best explains column sums [T, W]; `most`: those of a full one."""
    grid = np.meshgrid(np.arange(-2, 3) * step, np.arange(-2, 3) * step / 12, indexing="ij")
    near = setting + np.stack(grid, -1).reshape(-1, 2)
    error = np.square(seen - most * _extent(_path(near), bounce.WIDTH)).sum((1, 2))
    return np.asarray(near[int(np.argmin(error))])


def _errors(pixels: np.ndarray, rendered: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Root mean squared error per frame, [T]; what stands out of the backdrop, found or rendered, weighs more.

    Grey on top of the rendered scene, which holds no square, is passed over: it is judged as `square`. If it were an
    error of the frames too, leaving the square out would look better than drawing it as well as one can. No more grey
    than a square has is passed over, or haze would cost nothing.
    """
    above = pixels - rendered.astype(np.float32)
    grey = np.maximum(np.minimum(np.minimum(above[..., 0], above[..., 1]), above[..., 2]), 0.0)
    passed = np.minimum(_SQUARE_MASS / np.maximum(grey.sum((1, 2)), 1e-6), 1.0)
    pixels = pixels - (passed[:, None, None] * grey)[..., None]
    off = np.abs(pixels - bounce.backdrop().astype(np.float32))
    stray = np.maximum(np.maximum(off[..., 0], off[..., 1]), off[..., 2]) / 0.3
    weight = 1 + _OBJECT_WEIGHT * np.maximum(coverage.astype(np.float32), np.minimum(stray, 1.0))
    error = pixels - rendered.astype(np.float32)
    squares = np.einsum("thwc,thwc->thw", error, error) / 3
    return np.asarray(np.sqrt(np.einsum("thw,thw->t", weight, squares) / weight.sum((1, 2))), dtype=np.float64)


def _edge_slope(found: np.ndarray, rendered: np.ndarray) -> float:
    """Slope of the found source's gradients on the rendered one's."""
    over = product = 0.0
    for axis in (1, 2):
        a, b = np.diff(found, axis=axis).ravel(), np.diff(rendered, axis=axis).ravel()
        product += float(a @ b)
        over += float(b @ b)
    return max(product / max(over, 1e-9), 0.0)
