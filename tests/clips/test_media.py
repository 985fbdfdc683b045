import errno
import os
import wave
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import av
import numpy as np
import pytest

from omninft.clips import media
from omninft.clips.media import SOUND_VARIABLE, VIDEO_VARIABLE, read_clip, read_wav, write_clip, write_png, write_wav
from omninft.types import Clip, OmniNFTError, Prompt

PROMPT = Prompt("rain-1", "rain", "rain", "rain rain")
NTSC = 30000 / 1001


def make_clip(
    num_frames: int = 13,
    frame_rate: float = 24.0,
    sample_rate: int = 16000,
    channels: int = 1,
    num_samples: int | None = None,
    size: tuple[int, int] = (32, 48),
) -> Clip:
    """A smooth picture whose brightness counts the frames, and a quiet chord."""
    height, width = size
    video = np.zeros((num_frames, height, width, 3), np.uint8)
    video[..., 0] = np.linspace(40, 220, width)
    video[..., 1] = np.linspace(30, 200, height)[:, None]
    video[..., 2] = (np.arange(num_frames) * 9)[:, None, None]
    num_samples = round(num_frames / frame_rate * sample_rate) if num_samples is None else num_samples
    time = np.arange(num_samples) / sample_rate
    waveform = np.stack([0.3 * np.sin(2 * np.pi * hertz * time) for hertz in (440, 660, 880)[:channels]])
    return Clip(video, frame_rate, waveform.astype(np.float32), sample_rate, PROMPT)


def mux(
    path: Path,
    grey: Sequence[int],
    frame_times: Sequence[float],
    waveform: np.ndarray | None = None,
    sound_time: float = 0.0,
) -> Path:
    """A file as others make them: one grey level a frame at any times in seconds, PCM sound at 16 kHz from any time on.

    It states a frame rate of 30 Hz whatever the times are.
    """
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=30, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = 16, 16, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono") if waveform is not None else None
        for level, time in zip(grey, frame_times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and waveform is not None:
            sound = av.AudioFrame.from_ndarray((waveform * 32767).astype("<i2"), format="s16", layout="mono")
            sound.sample_rate, sound.time_base, sound.pts = 16000, Fraction(1, 16000), round(sound_time * 16000)
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
    return path


def failure(path: Path) -> str:
    with pytest.raises(OmniNFTError) as caught:
        read_clip(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("frame_rate", "sample_rate", "channels"),
    [(24.0, 16000, 1), (24.0, 24000, 2), (NTSC, 48000, 2), (12.5, 44100, 1), (23.976, 48000, 1), (8.0, 7350, 2)],
)
def test_clip_comes_back(tmp_path: Path, frame_rate: float, sample_rate: int, channels: int) -> None:
    clip = make_clip(frame_rate=frame_rate, sample_rate=sample_rate, channels=channels)
    write_clip(tmp_path / "a.mp4", clip)
    back = read_clip(tmp_path / "a.mp4", PROMPT)
    assert back.video.shape == clip.video.shape
    assert back.video.dtype == np.uint8
    assert back.frame_rate == frame_rate
    assert back.waveform.shape == clip.waveform.shape
    assert back.waveform.dtype == np.float32
    assert back.sample_rate == sample_rate
    assert back.prompt == PROMPT
    # A wrong matrix (BT.601 for BT.709) is off by 10 and more in places; a frame too late by 9 in blue.
    assert np.abs(back.video.astype(int) - clip.video).mean() < 2.5
    error = np.sqrt(np.mean((back.waveform - clip.waveform) ** 2) / np.mean(clip.waveform**2))
    assert error < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("num_samples", [1, 1023, 5000, 20000])
def test_sound_of_another_length_than_the_video_keeps_it(tmp_path: Path, num_samples: int) -> None:
    write_clip(tmp_path / "a.mp4", make_clip(num_samples=num_samples))
    assert read_clip(tmp_path / "a.mp4").waveform.shape == (1, num_samples)


@pytest.mark.parametrize("sample_rate", [16000, 48000])
@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.52])
def test_click_stays_within_a_millisecond_of_its_time(tmp_path: Path, sample_rate: int, seconds: float) -> None:
    clip = make_clip(sample_rate=sample_rate)
    clip.waveform[:] = 0
    clip.waveform[0, round(seconds * sample_rate)] = 0.9
    write_clip(tmp_path / "a.mp4", clip)
    back = read_clip(tmp_path / "a.mp4").waveform[0]
    assert abs(np.abs(back).argmax() / sample_rate - seconds) < 0.001
    assert np.abs(back).max() > 0.5


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
@pytest.mark.parametrize(("video_start", "sound_start"), [(0.0, 0.0), (0.0, 0.2), (0.2, 0.0), (0.1, 0.3)])
def test_sample_zero_is_the_time_of_frame_zero(
    tmp_path: Path, suffix: str, video_start: float, sound_start: float
) -> None:
    waveform = np.zeros((1, 16000), np.float32)
    waveform[0, 8000] = 0.9  # half a second into the sound
    times = [video_start + n / 20 for n in range(20)]
    back = read_clip(mux(tmp_path / f"a{suffix}", [n * 10 for n in range(20)], times, waveform, sound_start))
    assert back.video.shape[0] == 20
    assert back.frame_rate == pytest.approx(20, rel=0.001)
    assert back.waveform[0].argmax() / 16000 == pytest.approx(0.5 + sound_start - video_start, abs=0.001)
    assert back.waveform.shape[1] == pytest.approx(16000 * (1 + sound_start - video_start), abs=16)


def test_irregular_frames_are_put_on_the_average_rate(tmp_path: Path) -> None:
    # Five intervals in 1 s: 5 Hz. Middles at .1 .3 .5 .7 .9 1.1 s.
    path = mux(tmp_path / "a.mov", [0, 40, 80, 120, 160, 200], [0, 0.05, 0.2, 0.6, 0.8, 1.0])
    back = read_clip(path, require_audio=False)
    assert back.frame_rate == pytest.approx(5.0)
    assert [round(level / 40) for level in back.video.mean(axis=(1, 2, 3))] == [1, 2, 2, 3, 4, 5]


def test_upscale_enlarges_each_pixel(tmp_path: Path) -> None:
    clip = make_clip(num_frames=3, size=(9, 11))
    with pytest.raises(OmniNFTError, match="frames would be 11x9 pixels; yuv420p needs even sizes"):
        write_clip(tmp_path / "a.mp4", clip)
    write_clip(tmp_path / "a.mp4", clip, upscale=4)
    back = read_clip(tmp_path / "a.mp4").video
    assert back.shape == (3, 36, 44, 3)
    blocks = back.reshape(3, 9, 4, 11, 4, 3).astype(float)
    assert np.abs(blocks.mean(axis=(2, 4)) - clip.video).mean() < 4
    with pytest.raises(OmniNFTError, match="upscale is 0, expected an integer from 1"):
        write_clip(tmp_path / "a.mp4", clip, upscale=0)


def test_smaller_crf_is_closer(tmp_path: Path) -> None:
    clip = make_clip(num_frames=4)
    noise = np.random.default_rng(0).integers(0, 255, (4, 4, 6, 3)).repeat(8, axis=1).repeat(8, axis=2)
    clip = replace(clip, video=noise.astype(np.uint8))
    errors = []
    for crf in (1, 18, 45):
        write_clip(tmp_path / "a.mp4", clip, crf=crf)
        errors.append(np.abs(read_clip(tmp_path / "a.mp4").video.astype(int) - clip.video).mean())
    assert errors[0] < errors[1] < errors[2] - 2


def test_file_starts_with_its_index_and_states_its_colours(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", make_clip())
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        # BT.709 matrix, primaries and transfer; limited range.
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert container.streams.audio[0].codec_context.name == "aac"


def test_sound_and_video_lie_side_by_side_in_the_file(tmp_path: Path) -> None:
    # Longer than the 10 s for which the muxer itself waits for the other stream.
    write_clip(tmp_path / "a.mp4", make_clip(num_frames=120, frame_rate=4.0, size=(16, 16)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [(p.pos, p.stream_index) for p in container.demux() if p.size and p.pos is not None]
    streams = [stream for _, stream in sorted(packets)]
    # A player that has the first half of the file has the first half of both.
    first_half = streams[: len(streams) // 2]
    for stream in (0, 1):
        assert first_half.count(stream) == pytest.approx(streams.count(stream) / 2, rel=0.25)


def test_no_sound_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    silent = replace(make_clip(), waveform=np.zeros((0, 0), np.float32), sample_rate=0)
    write_clip(path, silent)
    assert failure(path) == f"{path}: the file has no sound; expected a video with a sound stream"
    back = read_clip(path, require_audio=False)
    assert back.waveform.shape == (0, 0)
    assert back.sample_rate == 0
    assert back.video.shape == silent.video.shape
    assert back.prompt == Prompt("a", "", "", "")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.mp4"
    assert failure(path) == f"{path}: no such file"
    path = tmp_path / "text.mp4"
    path.write_text("this is no video\n" * 100)
    assert "not a video, or truncated or damaged" in failure(path)
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "not a video, or truncated or damaged" in failure(path)
    path = tmp_path / "sound.wav"
    write_wav(path, np.zeros((1, 800), np.float32), 16000)
    assert failure(path) == f"{path}: the file has no video stream"


def test_truncated_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_clip(whole, make_clip(num_frames=24, channels=2))
    content = whole.read_bytes()
    with av.open(str(whole)) as container:
        packets = [(p.pos, p.size) for p in container.demux() if p.size and p.pos is not None]
    # Between packets nothing looks broken: only the declared durations tell.
    between = [pos for pos, _ in sorted(packets)][1::6]
    inside = range(100, len(content), len(content) // 15)
    messages = []
    for end in (*between, *inside, len(content) - 1):
        cut.write_bytes(content[:end])
        messages.append(failure(cut))
        assert any(word in messages[-1] for word in ("truncated", "no frames", "no video stream")), messages[-1]
    for expected in (
        "(a packet of stream 0 is incomplete)",
        "(a packet of stream 1 is incomplete)",
        "the video ends at",
    ):
        assert any(expected in message for message in messages), expected
    cut.write_bytes(content[: content.index(b"mdat") + 4])
    assert failure(cut) == f"{cut}: the video stream has no frames"


def test_failed_write_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    write_clip(path, make_clip(num_frames=5))
    before = path.read_bytes()

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    writes: list[Callable[[], None]] = [
        lambda: write_clip(path, make_clip(num_frames=6)),
        lambda: write_wav(path, np.zeros((1, 8)), 16000),
        lambda: write_png(path, np.zeros((2, 2, 3), np.uint8)),
    ]
    for write in writes:
        with pytest.raises(OmniNFTError, match=r"cannot be written .*No space left on device") as caught:
            write()
        assert str(path) in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        assert path.read_bytes() == before


def test_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "clips").write_text("x")
    path = tmp_path / "clips" / "a.mp4"
    with pytest.raises(OmniNFTError, match="cannot be written") as caught:
        write_clip(path, make_clip(num_frames=1))
    assert str(path) in str(caught.value)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_clip(tmp_path / "new" / "er" / "a.mp4", make_clip(num_frames=1))
    assert read_clip(tmp_path / "new" / "er" / "a.mp4").video.shape[0] == 1


BAD_CLIPS = [
    ({"video": np.zeros((2, 4, 4), np.uint8)}, r"video is uint8 \[2, 4, 4\], expected uint8"),
    ({"video": np.zeros((2, 4, 4, 3), np.float32)}, r"video is float32 \[2, 4, 4, 3\], expected uint8"),
    ({"video": np.zeros((0, 4, 4, 3), np.uint8)}, "with at least one frame"),
    ({"waveform": np.zeros((3, 9), np.float32)}, r"waveform has shape \[3, 9\], expected .* one or two channels"),
    ({"waveform": np.zeros(9, np.float32)}, r"waveform has shape \[9\], expected"),
    ({"waveform": np.array([[0, np.nan, np.inf]])}, "2 of 3 samples of the waveform are not finite"),
    ({"sample_rate": 44000}, "sample_rate is 44000 Hz; AAC has 7350, 8000, .*96000"),
    ({"frame_rate": 0.0}, "frame_rate is 0.0 Hz, expected at least 0.01"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CLIPS)
def test_clips_that_mp4_cannot_hold_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        write_clip(tmp_path / "a.mp4", replace(make_clip(), **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_sound_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    clip = make_clip(num_frames=24)
    write_clip(tmp_path / "a.mp4", replace(clip, waveform=clip.waveform * 10))
    back = read_clip(tmp_path / "a.mp4").waveform
    assert np.abs(back).max() <= 1.0
    assert np.sqrt(np.mean(back**2)) == pytest.approx(
        np.sqrt(np.mean(np.clip(clip.waveform * 10, -1, 1) ** 2)), rel=0.05
    )


def test_wav_holds_the_samples(tmp_path: Path) -> None:
    waveform = np.array([[0.0, 0.5, -1.0, 2.0], [0.25, 0.0, 1.0, -2.0]], np.float32)
    write_wav(tmp_path / "a.wav", waveform, 48000)
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (2, 2, 48000, 4)
        samples = np.frombuffer(file.readframes(4), "<i2").reshape(4, 2)
    assert samples.tolist() == [[0, 8192], [16384, 0], [-32767, 32767], [32767, -32767]]
    with pytest.raises(OmniNFTError, match=r"waveform has shape \[4\], expected \[channels, samples\]"):
        write_wav(tmp_path / "b.wav", waveform[0], 48000)
    with pytest.raises(OmniNFTError, match="1 of 1 samples of the waveform are not finite"):
        write_wav(tmp_path / "b.wav", np.array([[np.nan]]), 48000)


def test_png_is_lossless(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    write_png(tmp_path / "a.png", frame)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with av.open(str(tmp_path / "a.png")) as container:
        (back,) = (picture.to_ndarray(format="rgb24") for picture in container.decode(video=0))
    assert np.array_equal(back, frame)
    with pytest.raises(OmniNFTError, match=r"frame is float64 \[7, 5\], expected uint8 \[height, width, 3\]"):
        write_png(tmp_path / "b.png", np.zeros((7, 5)))


def test_a_wav_beside_the_video_is_its_sound(tmp_path: Path) -> None:
    clip = make_clip(channels=2)
    write_clip(tmp_path / "a.mp4", replace(clip, waveform=np.zeros((1, 0), np.float32)))
    write_wav(tmp_path / "a.wav", clip.waveform, 16000)
    read = read_clip(tmp_path / "a.mp4")
    assert read.sample_rate == 16000
    np.testing.assert_allclose(read.waveform, clip.waveform, atol=1 / 32000)
    # Also where the video has sound, which is compressed.
    write_clip(tmp_path / "b.mp4", clip)
    assert np.abs(read_clip(tmp_path / "b.mp4").waveform - clip.waveform).max() > 1 / 3200
    write_wav(tmp_path / "b.wav", clip.waveform, 16000)
    np.testing.assert_allclose(read_clip(tmp_path / "b.mp4").waveform, clip.waveform, atol=1 / 32000)


def test_tags_in_another_encoding_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "latin.mp4"
    write_clip(path, make_clip(num_frames=4))
    content = path.read_bytes()
    assert content.count(b"VideoHandler") == 1
    path.write_bytes(content.replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert len(read_clip(path).video) == 4


def test_truncated_wav_is_refused_and_an_open_stream_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, make_clip().waveform, 16000)
    content = path.read_bytes()
    path.write_bytes(content[:1044])
    with pytest.raises(
        OmniNFTError, match=rf"a\.wav: truncated: 1000 bytes of sound, the file declares {len(content) - 44}"
    ):
        read_wav(path)
    at = content.index(b"data") + 4
    path.write_bytes(content[:at] + b"\xff" * 4 + content[at + 4 : 1044])
    assert read_wav(path)[0].shape == (1, 500)


def test_damaged_wav_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF....WAVE")
    with pytest.raises(OmniNFTError, match=r"a\.wav: not a sound file"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("matrix", "turns"),  # a, b, c, d of the track's matrix (x, y) -> (ax + cy, bx + dy); quarter turns, left positive
    [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)],
)
def test_pictures_are_turned_as_the_file_says(tmp_path: Path, matrix: tuple[int, ...], turns: int) -> None:
    path = tmp_path / "phone.mp4"
    write_clip(path, make_clip(num_frames=4))
    plain = read_clip(path).video
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and duration, reserved, layer to volume
    identity = (1, 0, 0, 0, 1, 0)
    a, b, c, d = matrix
    assert [int.from_bytes(content[at + 4 * k : at + 4 * k + 4], "big", signed=True) >> 16 for k in range(6)] == [
        *identity
    ]
    for k, value in zip((0, 1, 3, 4), (a, b, c, d), strict=True):
        content[at + 4 * k : at + 4 * k + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_clip(path).video, np.rot90(plain, turns, axes=(1, 2)))


@pytest.mark.parametrize(
    ("ending", "codec", "sound"), [("webm", "libvpx-vp9", "libopus"), ("mov", "libx264", "pcm_s16le")]
)
def test_other_containers(tmp_path: Path, ending: str, codec: str, sound: str) -> None:
    path, clip = tmp_path / f"clip.{ending}", make_clip(num_frames=24, sample_rate=48000)
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream(codec, rate=24), container.add_stream(sound, rate=48000, layout="mono")
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        video.options = {"crf": "18"}
        for pixels in clip.video:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, 48000, 960):
            pcm = np.round(clip.waveform[:, start : start + 960] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    read = read_clip(path)
    assert read.video.shape == clip.video.shape
    assert read.frame_rate == pytest.approx(24)
    assert abs(read.waveform.shape[1] - 48000) <= 960
    overlap = min(read.waveform.shape[1], 48000)
    correlation = np.corrcoef(read.waveform[0, :overlap], clip.waveform[0, :overlap])[0, 1]
    assert correlation > 0.98


def test_a_file_is_refused_by_what_it_declares_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, video, sound = tmp_path / "a.mp4", 13 * 32 * 48 * 3, 8667 * 4
    write_clip(path, make_clip())
    for name, found in ((VIDEO_VARIABLE, video), (SOUND_VARIABLE, sound)):
        monkeypatch.setenv(name, str(found - 2000))
        with monkeypatch.context() as patch:
            patch.setattr(media, "_add_frame", lambda *_: pytest.fail("decoded"))
            with pytest.raises(OmniNFTError, match=rf"a\.mp4: it declares \d+ bytes of \w+, more than.*\${name}"):
                read_clip(path)
        monkeypatch.setenv(name, str(found + 8 * 1024))
        assert read_clip(path).video.nbytes == video
    monkeypatch.setenv(VIDEO_VARIABLE, "much")
    with pytest.raises(OmniNFTError, match=rf"\${VIDEO_VARIABLE} is 'much', expected a number of bytes"):
        read_clip(path)


def test_a_file_that_declares_nothing_is_stopped_while_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, frame = tmp_path / "a.h264", 32 * 48 * 3
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert path.stat().st_size < frame
    assert read_clip(path, require_audio=False).video.shape == (50, 32, 48, 3)
    monkeypatch.setenv(VIDEO_VARIABLE, str(10 * frame))
    with pytest.raises(OmniNFTError, match=rf"it takes {11 * frame} bytes of video, more than the {10 * frame}"):
        read_clip(path, require_audio=False)
    monkeypatch.delenv(VIDEO_VARIABLE)
    monkeypatch.setattr(media, "MOST_FRAMES", 20)
    with pytest.raises(OmniNFTError, match="decoded, it takes 21 frames, more than the 20 allowed"):
        read_clip(path, require_audio=False)


def test_the_sound_beside_a_video_has_its_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wav(tmp_path / "a.wav", np.zeros((2, 1000), np.float32), 16_000)
    monkeypatch.setenv(SOUND_VARIABLE, "8000")
    assert read_wav(tmp_path / "a.wav")[0].shape == (2, 1000)
    monkeypatch.setenv(SOUND_VARIABLE, "7999")
    with pytest.raises(OmniNFTError, match=r"a\.wav: decoded, it takes 8000 bytes of sound, more than the 7999"):
        read_wav(tmp_path / "a.wav")
