"""Clips put where a page finds them: copied, or made again where browsers would not play them, each with a still."""

from __future__ import annotations

import hashlib
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import soxr
from av.error import FFmpegError

from omninft.clips.media import AAC_SAMPLE_RATES, read_wav, sidecar_of, write_clip
from omninft.files import replacing, write_atomically
from omninft.gallery.players import Place
from omninft.gallery.posters import data_uri, poster
from omninft.gallery.run_folder import ClipRecord
from omninft.types import Clip, OmniNFTError

CLIPS, POSTERS = "clips", "posters"
# A page in one file is read whole before it shows anything, and browsers hold it in memory twice.
SINGLE_FILE_BYTES = 48 * 2**20  # of clips
# What Chromium, Firefox and Safari all play.
_CONTAINERS = (".mp4", ".m4v", ".webm")
_VIDEO_CODECS, _PIXELS = ("h264", "vp8", "vp9", "av1"), ("yuv420p", "yuvj420p")
_AUDIO_CODECS = ("aac", "mp3", "opus", "vorbis")


@dataclass(frozen=True)
class Placed:
    """A file of the page and where it came from."""

    file: str  # relative to the page
    source: Path
    is_copy: bool  # as it was; else made again


@dataclass
class ClipFolder:
    """Puts clips into `clips/` and stills into `posters/` of `root`, or both into the page itself.

    The names tell nothing: whoever judges clips blind must not read a system in them. Safe to use from several
    threads.
    """

    root: Path
    embed: bool = False
    placed: list[Placed] = field(default_factory=list)
    num_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, record: ClipRecord, clip: Clip) -> Place:
        """Raises OmniNFTError: the clip cannot be copied or written."""
        try:
            return self._place(record, clip)
        except OSError as error:
            raise OmniNFTError(f"{record.path.name}: cannot be put into {self.root} ({error})") from error

    def _place(self, record: ClipRecord, clip: Clip) -> Place:
        source = record.path
        is_copy = plays_in_browsers(source) and not _sounds_from_beside(source, clip)
        token = _digest(source)
        target = self.root / CLIPS / f"{token}{source.suffix.lower() if is_copy else '.mp4'}"
        if is_copy:
            # Equal clips share a name, and another thread may be at it.
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
        else:
            write_clip(target, playable(clip))
        with self._lock:
            self.placed.append(Placed(f"{CLIPS}/{target.name}", source, is_copy))
        still = poster(record, clip)
        if self.embed:
            return self._embedded(target, still)
        picture = self.root / POSTERS / f"{token}.jpg"
        write_atomically(picture, lambda temporary: temporary.write_bytes(still))
        return Place(f"{CLIPS}/{target.name}", f"{POSTERS}/{picture.name}")

    def _embedded(self, target: Path, still: bytes) -> Place:
        data = target.read_bytes()
        with self._lock:
            self.num_bytes += len(data)
        kind = "video/webm" if target.suffix == ".webm" else "video/mp4"
        return Place(data_uri(kind, data), data_uri("image/jpeg", still))


def plays_in_browsers(path: Path) -> bool:
    """Whether every common browser plays what is in the file: container and codecs."""
    if path.suffix.lower() not in _CONTAINERS:
        return False
    try:
        with av.open(str(path)) as container:
            video, audio = container.streams.video, container.streams.audio
            if not video or any(s.codec_context is None for s in (*video, *audio)):
                return False
            return (
                video[0].codec_context.codec.canonical_name in _VIDEO_CODECS
                and video[0].codec_context.pix_fmt in _PIXELS
                and all(a.codec_context.codec.canonical_name in _AUDIO_CODECS for a in audio)
            )
    except (FFmpegError, OSError):
        return False


def playable(clip: Clip) -> Clip:
    """The clip within what `write_clip` takes: even sizes, one or two channels, a sample rate of AAC."""
    video, sound, rate = clip.video, clip.waveform, clip.sample_rate
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    if len(sound) > 2:
        sound = sound.mean(axis=0, keepdims=True)
    if sound.size and rate not in AAC_SAMPLE_RATES:
        sound, rate = np.clip(soxr.resample(sound.T, rate, 48_000).T, -1, 1).astype(np.float32), 48_000
    return replace(clip, video=video, waveform=np.ascontiguousarray(sound), sample_rate=rate)


def _sounds_from_beside(source: Path, clip: Clip) -> bool:
    """Whether the clip's sound is that of a WAV file beside it, which a copy would not have."""
    beside = sidecar_of(source)
    return beside is not None and np.array_equal(read_wav(beside)[0], clip.waveform)


def _digest(source: Path) -> str:
    """12 hexadecimal digits of what is in the file, and in the sound beside it."""
    digest = hashlib.sha256()
    for path in (source, sidecar_of(source)):
        if path is not None and path.is_file():
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()[:12]
