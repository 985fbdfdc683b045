"""Clips as files: mp4 with sound (H.264 + AAC), WAV and PNG, written whole or not at all.

Reading undoes what containers and codecs do to time: sample 0 of a waveform is the instant of frame 0, so that
rewards that judge synchrony can index frames and samples by the same clock.
"""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import soundfile
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from omninft.files import replacing
from omninft.types import Clip, OmniNFTError, Prompt

# Rates an AAC stream can declare (ISO/IEC 14496-3, sampling frequency index), Hz.
AAC_SAMPLE_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_FRAME = 1024  # samples
# What one clip may unfold to. Files of strangers are small and decode to any size; 2 GiB are 60 seconds of
# 768 x 512 at 30 frames a second, and 512 MiB are 23 minutes of stereo at 48 kHz. A longer clip is
# read once these variables of the environment, in bytes, say so.
VIDEO_BYTES, SOUND_BYTES = 2**31, 2**29
VIDEO_VARIABLE, SOUND_VARIABLE = "OMNINFT_MAX_VIDEO_BYTES", "OMNINFT_MAX_SOUND_BYTES"
# Frames and packets cost memory beside their pixels: a clip of one pixel has not a billion of them.
MOST_FRAMES = 2**18
# Many containers count time in milliseconds: frames this close to a regular grid are on it.
_CLOCK_ROUNDING = Fraction(2, 1000)  # seconds


def write_clip(path: str | Path, clip: Clip, crf: int = 18, upscale: int = 1) -> None:
    """Write `clip` as mp4: H.264 yuv420p (BT.709) and AAC, index first so that browsers play at once.

    `crf` is x264's quality, 0 (lossless up to the colour conversion) to 51. Every pixel becomes `upscale` x `upscale`
    pixels, for clips too small to watch; `read_clip` gives the enlarged frames back. A waveform with no samples gives
    a file without sound. Samples outside [-1, 1] are clipped. Missing folders are made; the file appears under its
    name only once it is whole. The frame rate is stored as the nearest fraction with a denominator up to 1001
    (29.97002997 is 30000/1001 exactly).

    Raises OmniNFTError naming the path: frames that are not uint8 [T, H, W, 3] or of odd size, more than two
    channels, samples that are not finite, a sample rate that AAC lacks, or a write that failed.
    """
    path = Path(path)
    if upscale < 1:
        raise OmniNFTError(f"{path}: upscale is {upscale}, expected an integer from 1")
    _require_writable_clip(path, clip, upscale)
    rate = Fraction(clip.frame_rate).limit_denominator(1001)
    waveform = np.clip(clip.waveform, -1.0, 1.0).astype(np.float32)
    has_sound = waveform.size > 0
    # Edit lists count in the movie's time scale, by default milliseconds: too coarse to keep the number of samples.
    timescale = math.lcm(rate.numerator, clip.sample_rate) if has_sound else rate.numerator
    if timescale >= 2**31:
        timescale = clip.sample_rate
    options = {"movflags": "+faststart", "movie_timescale": str(timescale)}
    with _replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        video.height, video.width = (size * upscale for size in clip.video.shape[1:3])
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.time_base = 1 / rate
        # Untagged, players guess BT.601 or BT.709 by the size of the picture and tint small clips.
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        audio = container.add_stream("aac", rate=clip.sample_rate) if has_sound else None
        if audio is not None:
            audio.layout = "mono" if len(waveform) == 1 else "stereo"
            # An AAC frame holds at most 6144 bits a channel: six bits a sample.
            audio.bit_rate = min(128_000, 6 * clip.sample_rate) * len(waveform)
        written = 0  # samples
        for index, pixels in enumerate(clip.video):
            enlarged = np.repeat(np.repeat(pixels, upscale, axis=0), upscale, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(enlarged), format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(video.encode(frame))
            if audio is not None:
                end = math.ceil((index + 1) / rate * clip.sample_rate)
                written = _mux_sound(container, audio, waveform, written, end)
        container.mux(video.encode(None))
        if audio is not None:
            _mux_sound(container, audio, waveform, written, waveform.shape[1])
            container.mux(audio.encode(None))


def read_clip(
    path: str | Path,
    prompt: Prompt | None = None,
    require_audio: bool = True,
    max_bytes: int | None = None,
    sidecar: bool = True,
) -> Clip:
    """Read a video file with its sound.

    `video` is uint8 RGB, [T, H, W, 3]. Regular frames come as they are, at the rate that the file states; irregular
    ones are resampled to the average rate of their times, as many as there were, each showing what is on screen at
    the middle of its time. `waveform` is float32 [channels, N] in [-1, 1], with sample 0 at the time of frame 0: sound
    that starts earlier is cut, later is preceded by zeros, and the end is cut or padded with zeros to the duration
    that the sound stream declares (encoders append padding that is not sound).

    Pictures are turned as the file says they should be shown. Where a WAV of the same stem lies beside the file, the
    sound is that: generators and benchmarks put it there because the one in the video is compressed
    (`sidecar=False` reads that one). A file without sound is refused unless `require_audio` is False; its waveform
    then has shape [0, 0] and `sample_rate` 0. Without `prompt` the clip gets one with empty texts whose id is the
    file's stem.

    Files of strangers can unfold to any size: frames of more than `VIDEO_BYTES`, sound of more than `SOUND_BYTES`, more
    than `MOST_FRAMES` frames, and both together of more than `max_bytes` are refused, first by what the file declares
    and, as it may lie, again before the memory for each frame is taken.

    Raises OmniNFTError naming the file: missing, not a video, truncated or damaged, no frames, no sound, too large.
    """
    path = Path(path)
    if not path.is_file():
        raise OmniNFTError(f"{path}: no such file")
    budget = _Budget.of(path, max_bytes)
    try:
        # Names and tags inside a file may be in any encoding; none of them is read.
        with av.open(str(path), options=budget.pixel_limit, metadata_errors="replace") as container:
            decoded = _decode(path, container, budget)
    except (FFmpegError, OSError, ValueError) as error:
        raise OmniNFTError(f"{path}: not a video, or truncated or damaged ({error})") from error
    if not decoded.frames:
        raise OmniNFTError(f"{path}: the video stream has no frames")
    video, rate = _at_average_rate(decoded)
    waveform = decoded.waveform()
    beside = sidecar_of(path) if sidecar else None
    if beside is not None:
        waveform, decoded.sample_rate = read_wav(beside)
    if waveform.size == 0:
        if require_audio:
            raise OmniNFTError(f"{path}: the file has no sound; expected a video with a sound stream")
        waveform, decoded.sample_rate = np.zeros((0, 0), np.float32), 0
    if prompt is None:
        prompt = Prompt(id=path.stem, prompt_v="", prompt_a="", prompt_av="")
    return Clip(video, float(rate), waveform, decoded.sample_rate, prompt)


def sidecar_of(path: Path) -> Path | None:
    """The WAV of the same stem beside a video, which is its sound; None where there is none."""
    return next((wav for ending in (".wav", ".WAV") if (wav := path.with_suffix(ending)).is_file()), None)


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples [channels, N] float32 in [-1, 1], and their rate in Hz.

    Raises OmniNFTError naming the path: missing, not a sound file, truncated or damaged, or of more than `SOUND_BYTES`.
    """
    if not Path(path).is_file():
        raise OmniNFTError(f"{path}: no such file")
    try:
        _require_whole_wav(Path(path))
        about = soundfile.info(str(path))
        _Budget.of(Path(path)).spend(sound=about.frames * about.channels * 4)
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise OmniNFTError(f"{path}: not a sound file, or damaged ({error})") from error
    return np.ascontiguousarray(np.clip(samples.T, -1.0, 1.0)), int(rate)


def _require_whole_wav(path: Path) -> None:
    """Readers take what is there of a WAV that ends early; what it declares is in the header of its data."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                there = path.stat().st_size - file.tell()
                # Streams that were never closed declare nothing, or everything.
                if size not in (0, 0xFFFFFFFF) and there < size:
                    raise OmniNFTError(f"{path}: truncated: {there} bytes of sound, the file declares {size}")
                return
            file.seek(size + size % 2, os.SEEK_CUR)


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write float samples [channels, N] in [-1, 1] as 16-bit PCM; samples outside are clipped.

    Raises OmniNFTError naming the path: another shape, samples that are not finite, or a write that failed.
    """
    path = Path(path)
    if waveform.ndim != 2 or len(waveform) == 0:
        raise OmniNFTError(f"{path}: waveform has shape {list(waveform.shape)}, expected [channels, samples]")
    _require_finite(path, waveform)
    pcm = np.round(np.clip(waveform, -1.0, 1.0) * 32767).astype("<i2")
    with _replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(len(waveform))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(np.ascontiguousarray(pcm.T).tobytes())


def write_png(path: str | Path, frame: np.ndarray) -> None:
    """Write one RGB frame, uint8 [H, W, 3], losslessly.

    Raises OmniNFTError naming the path: another shape or dtype, or a write that failed.
    """
    path = Path(path)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise OmniNFTError(f"{path}: frame is {frame.dtype} {list(frame.shape)}, expected uint8 [height, width, 3]")
    encoder = av.VideoCodecContext.create("png", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    content = b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """As `files.replacing`; encoders fail in ways of their own."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except FFmpegError as error:
        raise OmniNFTError(f"{path}: cannot be written ({error})") from error


def _require_writable_clip(path: Path, clip: Clip, upscale: int) -> None:
    video, waveform = clip.video, clip.waveform
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or video.size == 0:
        found = f"{video.dtype} {list(video.shape)}"
        raise OmniNFTError(
            f"{path}: video is {found}, expected uint8 [frames, height, width, 3] with at least one frame"
        )
    height, width = (size * upscale for size in video.shape[1:3])
    if height % 2 or width % 2:
        raise OmniNFTError(
            f"{path}: frames would be {width}x{height} pixels; yuv420p needs even sizes (an even upscale makes them so)"
        )
    if not (math.isfinite(clip.frame_rate) and clip.frame_rate >= 0.01):
        raise OmniNFTError(f"{path}: frame_rate is {clip.frame_rate} Hz, expected at least 0.01")
    if waveform.ndim != 2 or len(waveform) > 2:
        raise OmniNFTError(
            f"{path}: waveform has shape {list(waveform.shape)}, expected [channels, samples] with one or two channels"
        )
    _require_finite(path, waveform)
    if waveform.size and clip.sample_rate not in AAC_SAMPLE_RATES:
        known = ", ".join(map(str, AAC_SAMPLE_RATES))
        raise OmniNFTError(f"{path}: sample_rate is {clip.sample_rate} Hz; AAC has {known}")


def _require_finite(path: Path, waveform: np.ndarray) -> None:
    bad = int(np.count_nonzero(~np.isfinite(waveform)))
    if bad:
        raise OmniNFTError(f"{path}: {bad} of {waveform.size} samples of the waveform are not finite")


def _mux_sound(
    container: av.container.OutputContainer, stream: AudioStream, waveform: np.ndarray, begin: int, end: int
) -> int:
    """Encode samples from `begin` in whole AAC frames until `end` is reached; return where it stopped."""
    rate = stream.codec_context.sample_rate
    while begin < min(end, waveform.shape[1]):
        piece = np.ascontiguousarray(waveform[:, begin : begin + _AAC_FRAME])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        container.mux(stream.encode(frame))
        begin += piece.shape[1]
    return begin


@dataclass
class _Budget:
    """How much of the memory a file may take, and how much of that is taken."""

    path: Path
    limits: dict[str, int]  # bytes of "video", "sound" and "clip", which is both
    variables: ClassVar = {"video": VIDEO_VARIABLE, "sound": SOUND_VARIABLE}
    held: dict[str, int] = field(default_factory=lambda: {"video": 0, "sound": 0})
    num_frames: int = 0

    @classmethod
    def of(cls, path: Path, max_bytes: int | None = None) -> _Budget:
        """As the environment says, and of `max_bytes` in all where that is given."""
        limits = {"video": _from_environment(VIDEO_VARIABLE, VIDEO_BYTES)}
        limits["sound"] = _from_environment(SOUND_VARIABLE, SOUND_BYTES)
        return cls(path, limits | {"clip": sum(limits.values()) if max_bytes is None else max_bytes})

    @property
    def pixel_limit(self) -> dict[str, str]:
        """Option that keeps ffmpeg itself from frames larger than that."""
        most = min(self.limits["video"], self.limits["clip"])
        return {"max_pixels": str(min(max(1, most // 3), 2**31 - 1))}

    def spend(self, video: int = 0, sound: int = 0) -> None:
        """Count bytes that are about to be held in memory."""
        self.held = {"video": self.held["video"] + video, "sound": self.held["sound"] + sound}
        self.num_frames += video > 0
        self.require("decoded, it takes", self.held["video"], self.held["sound"], self.num_frames)

    def require(self, what: str, video: int, sound: int, num_frames: int) -> None:
        """Raise OmniNFTError when these are beyond the limits."""
        for name, found in {"video": video, "sound": sound, "clip": video + sound}.items():
            if found > self.limits[name]:
                how = f" (${self.variables[name]} changes that)" if name in self.variables else ""
                raise OmniNFTError(
                    f"{self.path}: {what} {found} bytes of {name}, more than the {self.limits[name]} bytes allowed{how}"
                )
        if num_frames > MOST_FRAMES:
            raise OmniNFTError(f"{self.path}: {what} {num_frames} frames, more than the {MOST_FRAMES} allowed")


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal():
        raise OmniNFTError(f"${name} is {text!r}, expected a number of bytes")
    return int(text)


@dataclass
class _Decoded:
    """What a file holds, on the file's own clock (seconds)."""

    budget: _Budget
    stated_rate: Fraction | None  # Hz, as the container states it
    frames: list[np.ndarray] = field(default_factory=list)  # each [H, W, 3] uint8
    times: list[Fraction] = field(default_factory=list)
    video_end: Fraction = Fraction(0)
    sample_rate: int = 0
    sound: list[np.ndarray] = field(default_factory=list)  # each [channels, n] float32
    sound_start: Fraction = Fraction(0)
    sound_end: Fraction | None = None  # as declared

    def waveform(self) -> np.ndarray:
        """[channels, N] from the time of the first frame to the declared end of the sound; [0, 0] without sound."""
        if not self.sound:
            return np.zeros((0, 0), np.float32)
        samples = np.concatenate(self.sound, axis=1)
        offset = round((self.sound_start - self.times[0]) * self.sample_rate)
        self.budget.spend(sound=max(0, offset) * len(samples) * samples.itemsize)
        samples = samples[:, -offset:] if offset < 0 else np.pad(samples, ((0, 0), (offset, 0)))
        if self.sound_end is not None:
            length = max(0, round((self.sound_end - self.times[0]) * self.sample_rate))
            samples = np.pad(samples[:, :length], ((0, 0), (0, max(0, length - samples.shape[1]))))
        # The codec overshoots near full scale; a Clip promises [-1, 1].
        clipped: np.ndarray = np.clip(samples, -1.0, 1.0)
        return clipped


def _require_declared(budget: _Budget, video: VideoStream, audio: AudioStream | None) -> None:
    """Refuse a file by the size that its streams declare, before anything is decoded; what they leave out counts 0."""
    rate, size = video.average_rate or video.guessed_rate, video.codec_context
    seconds = video.duration * video.time_base if video.duration and video.time_base else Fraction(0)
    frames = max(video.frames, int(seconds * rate) if rate else 0)
    sound = 0
    if audio is not None and audio.duration and audio.time_base:
        samples = int(audio.duration * audio.time_base * audio.codec_context.sample_rate)
        sound = samples * audio.codec_context.channels * 4
    budget.require("it declares", frames * size.width * size.height * 3, sound, frames)


def _decode(path: Path, container: InputContainer, budget: _Budget) -> _Decoded:
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise OmniNFTError(f"{path}: the file has no video stream")
    video: VideoStream = videos[0]
    audio: AudioStream | None = container.streams.audio[0] if container.streams.audio else None
    # A stream whose description is cut short, or of an unknown codec, has no decoder.
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise OmniNFTError(f"{path}: stream {stream.index} is truncated or damaged, or of an unknown codec")
    _require_declared(budget, video, audio)
    video.codec_context.options = budget.pixel_limit
    decoded = _Decoded(budget, stated_rate=video.average_rate or video.guessed_rate)
    resampler: AudioResampler | None = None
    if audio is not None:
        decoded.sample_rate = audio.codec_context.sample_rate
        resampler = AudioResampler(format="fltp", layout=audio.layout, rate=decoded.sample_rate)
    for packet in container.demux([s for s in (video, audio) if s is not None]):
        if packet.is_corrupt:
            raise OmniNFTError(f"{path}: truncated or damaged (a packet of stream {packet.stream_index} is incomplete)")
        for frame in packet.decode():
            if isinstance(frame, av.VideoFrame):
                _add_frame(path, decoded, frame)
            elif isinstance(frame, av.AudioFrame) and resampler is not None:
                if not decoded.sound and frame.pts is not None and frame.time_base is not None:
                    decoded.sound_start = frame.pts * frame.time_base
                budget.spend(sound=frame.samples * len(frame.layout.channels) * 4)
                decoded.sound += [piece.to_ndarray() for piece in resampler.resample(frame)]
    if audio is not None and audio.duration is not None and audio.time_base is not None:
        decoded.sound_end = ((audio.start_time or 0) + audio.duration) * audio.time_base
    _require_whole(path, video, decoded)
    return decoded


def _add_frame(path: Path, decoded: _Decoded, frame: av.VideoFrame) -> None:
    decoded.budget.spend(video=frame.width * frame.height * 3)
    pixels = frame.to_ndarray(format="rgb24")
    if frame.rotation % 360:
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))  # phones film on their side
    if decoded.frames and pixels.shape != decoded.frames[0].shape:
        before, now = (f"{p.shape[1]}x{p.shape[0]}" for p in (decoded.frames[0], pixels))
        raise OmniNFTError(f"{path}: the frame size changes from {before} to {now} at frame {len(decoded.frames)}")
    period = 1 / decoded.stated_rate if decoded.stated_rate else Fraction(0)
    base = frame.time_base
    # Raw streams carry no times: their frames follow one another at the stated rate.
    time = frame.pts * base if frame.pts is not None and base is not None else decoded.video_end
    decoded.frames.append(pixels)
    decoded.times.append(time)
    decoded.video_end = time + (frame.duration * base if frame.duration and base is not None else period)


def _require_whole(path: Path, video: VideoStream, decoded: _Decoded) -> None:
    """A container with its index at the front opens although its end is missing: compare with what it declares."""
    ends: list[tuple[str, Fraction, Fraction, Fraction]] = []  # stream, decoded until, declared until, slack
    if decoded.frames and video.duration is not None and video.time_base is not None:
        declared = ((video.start_time or 0) + video.duration) * video.time_base
        # Containers round the duration, by less than half a frame.
        slack = (decoded.video_end - decoded.times[0]) / len(decoded.frames) / 2
        ends.append(("video", decoded.video_end, declared, slack))
    if decoded.sound and decoded.sound_end is not None:
        lengths = [piece.shape[1] for piece in decoded.sound]
        end = decoded.sound_start + Fraction(sum(lengths), decoded.sample_rate)
        # Encoders disagree on whether the last packet counts whole.
        ends.append(("sound", end, decoded.sound_end, Fraction(max(lengths), decoded.sample_rate)))
    for name, end, declared, slack in ends:
        if end < declared - slack:
            raise OmniNFTError(
                f"{path}: truncated: the {name} ends at {float(end):.3f} s, the file declares {float(declared):.3f} s"
            )


def _at_average_rate(decoded: _Decoded) -> tuple[np.ndarray, Fraction]:
    """Frames on a regular grid, and its rate in Hz."""
    start, times, stated = decoded.times[0], decoded.times, decoded.stated_rate
    if stated and all(abs(time - start - n / stated) < _CLOCK_ROUNDING for n, time in enumerate(times)):
        return np.stack(decoded.frames), stated
    # What a container states may be the rate of its clock or of its first frames; the times are what is shown.
    # How long the last one is shown is often missing, so the intervals between them count.
    rate = (len(times) - 1) / span if (span := times[-1] - start) > 0 else stated or Fraction(1)
    middles = [float(start + (n + Fraction(1, 2)) / rate) for n in range(len(times))]
    on_screen = np.searchsorted([float(time) for time in times], middles, side="right") - 1
    return np.stack([decoded.frames[index] for index in on_screen]), rate
