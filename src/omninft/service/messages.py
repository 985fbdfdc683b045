"""Clips on the wire: one safetensors blob per request. Nothing in it can run, nothing in it is believed.

The metadata entry "omninft" is a JSON description, `{"format": "omninft.clips/1", "clips": [...]}`. Clip n of it is

* `{"kind": "tensors", ...}`: the tensors "n.video", uint8 [T, H, W, 3], and "n.waveform", float32 [C, N], with
  `frame_rate` and `sample_rate` in Hz; a clip without sound has no sample and the rate 0; or
* `{"kind": "media", ...}`: the tensor "n.media", uint8 [bytes], an mp4 or webm file, whose rates are its own;

both with `id`, `prompt_v`, `prompt_a`, `prompt_av`, `category` (text or null) and `sample`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from omninft.clips.media import read_clip, write_clip
from omninft.types import Clip, OmniNFTError, Prompt

LONGEST_TIMEOUT = 86_400.0  # s that a client may ask a server to wait
CONTENT_TYPE = "application/vnd.omninft.clips"
FORMAT = "omninft.clips/1"
Encoding = Literal["tensors", "media"]
ENCODINGS: tuple[Encoding, ...] = ("tensors", "media")

_KEY = "omninft"
_SHOWN = 60  # characters of a refused value
_LENGTH_BYTES = 8  # of a safetensors file: little-endian length of the JSON header that follows


class MessageError(OmniNFTError):
    """A body that is not a message of this format, or is beyond the limits: field, found, expected."""


@dataclass(frozen=True)
class Limits:
    """What a message may hold. A server publishes its own, and its clients keep within them."""

    clips: int = 32
    bytes: int = 1 << 30  # of a body, and of its clips once decoded
    header_bytes: int = 4 << 20  # of the JSON that describes a body
    frames: int = 10_000
    pixels: int = 1 << 29  # frames x height x width of one clip
    channels: int = 8
    seconds: float = 600.0
    frame_rate: tuple[float, float] = (0.1, 1000.0)  # Hz
    sample_rate: tuple[int, int] = (1000, 384_000)  # Hz
    prompt_chars: int = 10_000
    id_chars: int = 1000


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: str
    prompt_v: str
    prompt_a: str
    prompt_av: str
    category: str | None = None
    sample: Annotated[int, Field(ge=0, lt=2**63)]

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.id, self.prompt_v, self.prompt_a, self.prompt_av, self.category)


class _Tensors(_Entry):
    kind: Literal["tensors"]
    frame_rate: float
    sample_rate: int


class _Media(_Entry):
    kind: Literal["media"]


class _Description(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["omninft.clips/1"]
    clips: list[Annotated[_Tensors | _Media, Field(discriminator="kind")]]


@dataclass(frozen=True)
class MediaClip:
    """A clip that still is a file's content; decoding costs time and memory, so its turn is chosen by the server."""

    content: bytes
    prompt: Prompt
    sample: int
    limits: Limits

    def decode(self, most_bytes: int | None = None) -> Clip:
        """Frames and sound, of at most `most_bytes` (default: the limit of a whole message).

        Raises OmniNFTError: neither mp4 nor webm, damaged, or beyond the limits.
        """
        # The demuxers of these two never open another file or address, as those of playlists would.
        if self.content[4:8] == b"ftyp":
            ending = ".mp4"
        elif self.content[:4] == b"\x1aE\xdf\xa3":
            ending = ".webm"
        else:
            raise OmniNFTError(f"media begins with {self.content[:8].hex(' ')}, expected an mp4 or webm file")
        with tempfile.TemporaryDirectory(prefix="omninft-") as folder:  # mode 0700
            path = Path(folder) / f"media{ending}"
            path.write_bytes(self.content)
            most = self.limits.bytes if most_bytes is None else most_bytes
            try:
                clip = read_clip(path, self.prompt, require_audio=False, max_bytes=most)
            except OmniNFTError as error:
                raise OmniNFTError(str(error).replace(str(path), "media")) from error
            except Exception as error:
                raise OmniNFTError(f"media cannot be decoded ({type(error).__name__}: {error})") from error
        clip = replace(clip, sample=self.sample)
        require_within(clip, self.limits, "media")
        return clip


def pack_message(clips: Sequence[Clip], encoding: Encoding = "tensors") -> bytes:
    """The body of a request. "tensors" is exact; "media" (H.264 and AAC) is lossy and some hundred times smaller.

    The clips are such that `require_within` accepts them. Files of the prompt (its first frame) stay behind.

    Raises:
        OmniNFTError: a clip that cannot be written as mp4.
    """
    entries: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for n, clip in enumerate(clips):
        prompt = clip.prompt
        entry: dict[str, Any] = {
            "id": prompt.id,
            "prompt_v": prompt.prompt_v,
            "prompt_a": prompt.prompt_a,
            "prompt_av": prompt.prompt_av,
            "category": prompt.category,
            "sample": int(clip.sample),
            "kind": encoding,
        }
        if encoding == "media":
            tensors[f"{n}.media"] = _as_mp4(clip)
        else:
            tensors[f"{n}.video"] = np.ascontiguousarray(clip.video)
            tensors[f"{n}.waveform"] = np.ascontiguousarray(clip.waveform)
            entry |= {"frame_rate": float(clip.frame_rate), "sample_rate": int(clip.sample_rate)}
        entries.append(entry)
    description = json.dumps({"format": FORMAT, "clips": entries}, ensure_ascii=False, allow_nan=False)
    return bytes(save(tensors, {_KEY: description}))


def parse_message(body: bytes, limits: Limits) -> list[Clip | MediaClip]:
    """The clips of a body, in order. The tensors are copies: the body may be dropped.

    Raises:
        MessageError: whatever else it is; the message names the field, what was found and what was expected.
    """
    if len(body) > limits.bytes:
        raise MessageError(f"the body has {len(body)} bytes, expected at most {limits.bytes}")
    header_bytes = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if header_bytes > limits.header_bytes:
        raise MessageError(
            f"the body declares a header of {header_bytes} bytes, expected at most {limits.header_bytes}"
        )
    try:
        # Checks names, types, shapes, offsets and the length of the whole against one another before it copies.
        tensors = dict(safetensors.deserialize(body))
    except safetensors.SafetensorError as error:
        raise MessageError(f"the body is not safetensors: {error}") from error
    text = _metadata(body[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]).get(_KEY)
    if text is None:
        raise MessageError(
            f"the safetensors metadata have no entry {_KEY!r}, expected the JSON description of the clips"
        )
    try:
        description = _Description.model_validate_json(text)
    except ValidationError as error:
        raise MessageError(_first_problem(error)) from error
    if not 1 <= len(description.clips) <= limits.clips:
        raise MessageError(f"clips has {len(description.clips)} entries, expected 1 to {limits.clips}")
    clips = [_parse_clip(n, entry, tensors, limits) for n, entry in enumerate(description.clips)]
    if tensors:
        raise MessageError(f"the tensor {_short(min(tensors))} belongs to no clip of the description")
    return clips


def require_within(clip: Clip, limits: Limits, where: str = "") -> None:
    """What every clip on the wire satisfies; the client asks before it sends, the server when it reads.

    Raises:
        MessageError: `where`.field, what was found, what was expected.
    """
    prefix = f"{where}." if where else ""

    def require(ok: bool, field: str, found: object, expected: str) -> None:
        if not ok:
            raise MessageError(f"{prefix}{field} is {found}, expected {expected}")

    video, waveform = clip.video, clip.waveform
    described = f"{video.dtype} {list(video.shape)}"
    layout = "uint8 [frames, height, width, 3], none of them 0"
    require(
        video.dtype == np.uint8 and video.ndim == 4 and video.shape[3] == 3 and video.size > 0,
        "video",
        described,
        layout,
    )
    require(len(video) <= limits.frames, "video", described, f"at most {limits.frames} frames")
    require(video.size // 3 <= limits.pixels, "video", described, f"at most {limits.pixels} frames x height x width")
    described = f"{waveform.dtype} {list(waveform.shape)}"
    require(waveform.dtype == np.float32 and waveform.ndim == 2, "waveform", described, "float32 [channels, samples]")
    require(len(waveform) <= limits.channels, "waveform", described, f"at most {limits.channels} channels")
    bad = int(np.count_nonzero(~np.isfinite(waveform)))
    require(bad == 0, "waveform", f"not finite in {bad} of {waveform.size} samples", "finite samples")
    low, high = limits.frame_rate
    require(low <= clip.frame_rate <= high, "frame_rate", clip.frame_rate, f"{low:g} to {high:g} Hz")
    least, most = limits.sample_rate
    if waveform.size:
        require(least <= clip.sample_rate <= most, "sample_rate", clip.sample_rate, f"{least} to {most} Hz")
    else:
        require(0 <= clip.sample_rate <= most, "sample_rate", clip.sample_rate, f"0 (no sound) to {most} Hz")
    seconds = max(len(video) / clip.frame_rate, waveform.shape[1] / max(clip.sample_rate, 1) if waveform.size else 0.0)
    require(seconds <= limits.seconds, "duration", f"{seconds:.3f} s", f"at most {limits.seconds:g} s")
    size = video.nbytes + waveform.nbytes
    require(size <= limits.bytes, "size", f"{size} bytes", f"at most {limits.bytes}")
    require(0 <= clip.sample < 2**63, "sample", clip.sample, "a number from 0")
    prompt = clip.prompt
    require(len(prompt.id) <= limits.id_chars, "id", f"{len(prompt.id)} characters", f"at most {limits.id_chars}")
    for field in ("prompt_v", "prompt_a", "prompt_av", "category"):
        text = getattr(prompt, field) or ""
        require(len(text) <= limits.prompt_chars, field, f"{len(text)} characters", f"at most {limits.prompt_chars}")
        require(_is_unicode(text), field, _short(text), "Unicode text (a surrogate stands alone)")
    require(_is_unicode(prompt.id), "id", _short(prompt.id), "Unicode text (a surrogate stands alone)")


def _metadata(header: bytes) -> dict[str, str]:
    """The library has read the header before, as JSON of the right types, but does not hand out the metadata."""
    try:
        return json.loads(header).get("__metadata__") or {}
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the header of the body is not JSON: {error}") from error


def _parse_clip(n: int, entry: _Tensors | _Media, tensors: dict[str, Any], limits: Limits) -> Clip | MediaClip:
    where = f"clips[{n}]"
    if isinstance(entry, _Media):
        content = _take(tensors, f"{n}.media", "U8", 1)
        empty = np.zeros((1, 1, 1, 3), np.uint8)
        # Of a file only the texts can be judged before it is decoded.
        require_within(Clip(empty, 1.0, np.zeros((0, 0), np.float32), 0, entry.prompt, entry.sample), limits, where)
        return MediaClip(content.tobytes(), entry.prompt, entry.sample, limits)
    video = _take(tensors, f"{n}.video", "U8", 4)
    waveform = _take(tensors, f"{n}.waveform", "F32", 2)
    clip = Clip(video, entry.frame_rate, waveform, entry.sample_rate, entry.prompt, entry.sample)
    require_within(clip, limits, where)
    return clip


def _take(tensors: dict[str, Any], name: str, dtype: str, rank: int) -> np.ndarray:
    """Remove one tensor from the rest; the library has checked that its bytes are as many as its shape says."""
    found: Mapping[str, Any] | None = tensors.pop(name, None)
    if found is None:
        raise MessageError(f"the tensor {name!r} is missing, expected {dtype} of rank {rank}")
    shape = list(found["shape"])
    # numpy counts elements in 63 bits also where one of the sizes is 0.
    if found["dtype"] != dtype or len(shape) != rank or math.prod(s or 1 for s in shape) >= 2**60:
        raise MessageError(f"the tensor {name!r} is {found['dtype']} {_short(shape)}, expected {dtype} of rank {rank}")
    return np.frombuffer(found["data"], np.uint8 if dtype == "U8" else "<f4").reshape(shape)


def _as_mp4(clip: Clip) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="omninft-") as folder:
        path = Path(folder) / "media.mp4"
        try:
            write_clip(path, clip)
        except OmniNFTError as error:
            raise OmniNFTError(str(error).replace(str(path), "as media")) from error
        return np.frombuffer(path.read_bytes(), np.uint8)


def _first_problem(error: ValidationError) -> str:
    """One line of pydantic's findings: where, what it found, what it expected."""
    first, *more = error.errors(include_url=False, include_context=False)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    # The tag of a discriminated union is no field of the message.
    path = path.replace("].tensors.", "].").replace("].media.", "].").lstrip(".") or "the description"
    found = "missing" if first["type"] == "missing" else _short(first["input"])
    others = f" (and {len(more)} more problems)" if more else ""
    return f"{path} is {found}, expected: {first['msg']}{others}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
