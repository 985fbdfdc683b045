from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from omninft.clips.media import write_clip
from omninft.service.messages import (
    FORMAT,
    Limits,
    MediaClip,
    MessageError,
    pack_message,
    parse_message,
    require_within,
)
from omninft.types import Clip, OmniNFTError, Prompt
from tests.service.clips import clip

LIMITS = Limits()
VALID = pack_message([clip(0), clip(1)])


def described(
    clips: list[dict[str, Any]] | None = None, tensors: dict[str, np.ndarray] | None = None, **top: Any
) -> bytes:
    """A message written here, from the documented layout."""
    entry = {
        "kind": "tensors",
        "id": "p",
        "prompt_v": "v",
        "prompt_a": "a",
        "prompt_av": "v a",
        "category": None,
        "sample": 3,
        "frame_rate": 12.5,
        "sample_rate": 8000,
    }
    if tensors is None:
        tensors = {"0.video": np.ones((2, 4, 6, 3), np.uint8), "0.waveform": np.zeros((1, 100), np.float32)}
    entries = [{k: v for k, v in (entry | change).items() if v is not ...} for change in (clips or [{}])]
    return bytes(save(tensors, {"omninft": json.dumps({"format": FORMAT, "clips": entries} | top)}))


def raw(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_what_is_packed_is_what_is_read() -> None:
    silent = dataclasses.replace(clip(7), waveform=np.zeros((0, 0), np.float32), sample_rate=0)
    odd = dataclasses.replace(
        clip(8), frame_rate=24000 / 1001, prompt=Prompt("ü/..", 'schöner \U0001f600 "Ball"', "", "", None)
    )
    sent = [clip(0), silent, odd]
    read = parse_message(pack_message(sent), LIMITS)
    assert len(read) == 3
    for a, b in zip(sent, read, strict=True):
        assert isinstance(b, Clip)
        assert (a.prompt, a.sample, a.frame_rate, a.sample_rate) == (b.prompt, b.sample, b.frame_rate, b.sample_rate)
        np.testing.assert_array_equal(a.video, b.video)
        np.testing.assert_array_equal(a.waveform, b.waveform)
        assert (b.video.dtype, b.waveform.dtype) == (np.uint8, np.float32)
        assert b.video.flags.writeable  # torch warns of arrays that are not


def test_a_message_written_from_the_documentation_is_read() -> None:
    (read,) = parse_message(described(), LIMITS)
    assert isinstance(read, Clip)
    assert read.video.shape == (2, 4, 6, 3)
    assert (read.frame_rate, read.sample_rate, read.sample, read.prompt.prompt_av) == (12.5, 8000, 3, "v a")


def test_views_of_other_layout_are_packed_by_value() -> None:
    flipped = dataclasses.replace(clip(), video=clip().video[:, ::-1, ::2], waveform=clip().waveform[:, ::-1])
    (read,) = parse_message(pack_message([flipped]), LIMITS)
    assert isinstance(read, Clip)
    np.testing.assert_array_equal(read.video, clip().video[:, ::-1, ::2])
    np.testing.assert_array_equal(read.waveform, clip().waveform[:, ::-1])


def test_media_are_read_back_within_the_codecs_tolerance() -> None:
    ramp = np.linspace(30, 220, 64, dtype=np.uint8)
    video = np.broadcast_to(ramp[None, None, :, None], (12, 48, 64, 3))
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)[None].astype(np.float32)
    sent = Clip(video, 24.0, tone, 16_000, Prompt("p", "v", "a", "v a", "c"), 5)
    body = pack_message([sent], "media")
    (packed,) = parse_message(body, LIMITS)
    assert isinstance(packed, MediaClip)
    read = packed.decode()
    assert (read.prompt, read.sample, read.frame_rate, read.sample_rate) == (sent.prompt, 5, 24.0, 16_000)
    assert read.video.shape == video.shape
    assert np.abs(read.video.astype(int) - video).max() <= 6
    assert read.waveform.shape == (1, 8000)
    assert np.abs(read.waveform - tone)[:, 2048:7000].max() < 0.05  # the encoder begins from silence
    assert len(body) < video.nbytes / 5


CASES = {
    "kind": (described([{"kind": "path"}]), r"clips\[0\].*path.*tensors"),
    "format": (described(format="omninft.clips/2"), "format is 'omninft.clips/2', expected"),
    "unknown key": (described([{"path": "/etc/passwd"}]), r"clips\[0\]\.path is '/etc/passwd'"),
    "missing key": (described([{"prompt_a": ...}]), r"clips\[0\]\.prompt_a is missing"),
    "text": (described([{"prompt_v": 3}]), r"clips\[0\]\.prompt_v is 3"),
    "sample": (described([{"sample": -1}]), r"clips\[0\]\.sample is -1, expected: .*greater than or equal to 0"),
    "large sample": (described([{"sample": 2**63}]), r"clips\[0\]\.sample"),
    "rate": (described([{"frame_rate": 0.0}]), r"clips\[0\]\.frame_rate is 0\.0, expected 0\.1 to 1000 Hz"),
    "nan rate": (described([{"frame_rate": float("nan")}]), r"clips\[0\]\.frame_rate is nan"),
    "text rate": (described([{"frame_rate": "24"}]), r"clips\[0\]\.frame_rate is '24'"),
    "sample rate": (described([{"sample_rate": 10}]), r"clips\[0\]\.sample_rate is 10, expected 1000 to 384000 Hz"),
    "no clips": (
        raw({"__metadata__": {"omninft": json.dumps({"format": FORMAT, "clips": []})}}),
        "clips has 0 entries, expected 1 to 32",
    ),
    "no description": (save({"0.video": np.zeros((1, 1, 1, 3), np.uint8)}), "no entry 'omninft'"),
    "no tensor": (described(tensors={"0.video": np.ones((1, 2, 2, 3), np.uint8)}), r"'0\.waveform' is missing"),
    "another tensor": (
        described(
            tensors={
                "0.video": np.ones((1, 2, 2, 3), np.uint8),
                "0.waveform": np.zeros((1, 9), np.float32),
                "1.video": np.ones(3, np.uint8),
            }
        ),
        r"'1\.video' belongs to no clip",
    ),
    "dtype": (
        described(tensors={"0.video": np.ones((1, 2, 2, 3), np.float32), "0.waveform": np.zeros((1, 9), np.float32)}),
        r"'0\.video' is F32 \[1, 2, 2, 3\], expected U8 of rank 4",
    ),
    "rank": (
        described(tensors={"0.video": np.ones((2, 2, 3), np.uint8), "0.waveform": np.zeros((1, 9), np.float32)}),
        r"'0\.video' is U8 \[2, 2, 3\], expected U8 of rank 4",
    ),
    "channels last": (
        described(tensors={"0.video": np.ones((1, 3, 2, 2), np.uint8), "0.waveform": np.zeros((1, 9), np.float32)}),
        r"clips\[0\]\.video is uint8 \[1, 3, 2, 2\], expected uint8 \[frames, height, width, 3\]",
    ),
    "no frame": (
        described(tensors={"0.video": np.ones((0, 2, 2, 3), np.uint8), "0.waveform": np.zeros((1, 9), np.float32)}),
        r"clips\[0\]\.video is uint8 \[0, 2, 2, 3\]",
    ),
    "not finite": (
        described(
            tensors={
                "0.video": np.ones((1, 2, 2, 3), np.uint8),
                "0.waveform": np.array([[0, np.nan, np.inf]], np.float32),
            }
        ),
        r"clips\[0\]\.waveform is not finite in 2 of 3 samples",
    ),
    "9 channels": (
        described(tensors={"0.video": np.ones((1, 2, 2, 3), np.uint8), "0.waveform": np.zeros((9, 9), np.float32)}),
        r"at most 8 channels",
    ),
    "long sound": (
        described(
            [{"sample_rate": 1000}],
            {"0.video": np.ones((1, 2, 2, 3), np.uint8), "0.waveform": np.zeros((1, 601_000), np.float32)},
        ),
        r"clips\[0\]\.duration is 601\.000 s, expected at most 600 s",
    ),
    "long prompt": (described([{"prompt_av": "x" * 10_001}]), r"prompt_av is 10001 characters, expected at most 10000"),
    "media of no size": (
        described([{"kind": "media", "frame_rate": ..., "sample_rate": ...}], {"0.media": np.ones((2, 2), np.uint8)}),
        r"'0\.media' is U8 \[2, 2\], expected U8 of rank 1",
    ),
    "a huge shape": (
        raw(
            {
                "__metadata__": {"omninft": "{}"},
                "0.video": {"dtype": "U8", "shape": [2**40, 2**40, 2, 3], "data_offsets": [0, 0]},
            }
        ),
        "not safetensors",
    ),
    "offsets beyond the end": (
        raw({"0.video": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}, b"abc"),
        "not safetensors",
    ),
    "overlapping": (
        raw(
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"abc",
        ),
        "not safetensors",
    ),
    "trailing bytes": (VALID + b"x", "not safetensors"),
    "cut": (VALID[:-1], "not safetensors"),
    "a header length of 2**63": (
        struct.pack("<Q", 2**63) + b"{}",
        "declares a header of 9223372036854775808 bytes, expected at most 4194304",
    ),
    "nothing": (b"", "not safetensors"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", "declares a header"),
}


def test_a_huge_shape_of_no_bytes() -> None:
    body = described([{"frame_rate": 1.0, "sample_rate": 0}])
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    header["0.video"] = {"dtype": "U8", "shape": [2**40, 2**20, 0, 3], "data_offsets": [0, 0]}
    header["0.waveform"] = {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}
    with pytest.raises(MessageError, match=r"'0\.video' is U8 \[1099511627776, 1048576, 0, 3\]"):
        parse_message(raw(header), LIMITS)


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str) -> None:
    body, message = CASES[case]
    with pytest.raises(MessageError, match=message):
        parse_message(bytes(body), LIMITS)


def test_limits_hold_at_their_edge() -> None:
    one = clip(0, frames=4, size=8)
    body = pack_message([one])
    size = one.video.nbytes + one.waveform.nbytes
    for limits in (
        Limits(bytes=len(body)),
        Limits(clips=1),
        Limits(frames=4),
        Limits(pixels=256),
        Limits(channels=2),
        Limits(seconds=4 / 24),
        Limits(prompt_chars=len("a red ball a thud")),
    ):
        assert len(parse_message(body, limits)) == 1
    for limits, message in (
        (Limits(bytes=len(body) - 1), f"the body has {len(body)} bytes, expected at most {len(body) - 1}"),
        (Limits(frames=3), r"video is uint8 \[4, 8, 8, 3\], expected at most 3 frames"),
        (Limits(pixels=255), "at most 255 frames x height x width"),
        (Limits(channels=1), r"waveform is float32 \[2, 1600\], expected at most 1 channels"),
        (Limits(seconds=0.16), r"duration is 0\.167 s, expected at most 0\.16 s"),
        (Limits(prompt_chars=9), "prompt_v is 10 characters, expected at most 9"),
        (Limits(header_bytes=20), "declares a header"),
    ):
        with pytest.raises(MessageError, match=message):
            parse_message(body, limits)
    with pytest.raises(MessageError, match="clips has 2 entries, expected 1 to 1"):
        parse_message(VALID, Limits(clips=1))
    with pytest.raises(MessageError, match=f"size is {size} bytes"):
        require_within(one, Limits(bytes=size - 1))


def test_the_client_refuses_what_the_service_would() -> None:
    for change, message in (
        ({"video": np.zeros((2, 2, 3), np.uint8)}, "video is uint8"),
        ({"waveform": np.zeros((1, 10), np.float64)}, "waveform is float64"),
        ({"waveform": np.full((1, 10), np.nan, np.float32)}, "not finite in 10 of 10"),
        ({"prompt": Prompt("p", "\ud800", "", "")}, "prompt_v is .*surrogate"),
        ({"sample_rate": 0}, "sample_rate is 0"),
    ):
        with pytest.raises(MessageError, match=message):
            require_within(dataclasses.replace(clip(), **change), LIMITS)  # type: ignore[arg-type]


def media_message(content: bytes) -> bytes:
    return described(
        [{"kind": "media", "frame_rate": ..., "sample_rate": ...}], {"0.media": np.frombuffer(content, np.uint8)}
    )


def decode(content: bytes, limits: Limits = LIMITS) -> Clip:
    (packed,) = parse_message(media_message(content), limits)
    assert isinstance(packed, MediaClip)
    return packed.decode()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("media") / "a.mp4"
    write_clip(path, clip(0, frames=6, size=32))
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"RIFF\x00\x00\x00\x00AVI ",
        b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00" + b"\x00" * 50,
        b"\x1aE\xdf\xa3" + b"\xff" * 50,
        b"",
    ],
)
def test_media_of_other_kinds_are_refused_without_being_opened(content: bytes) -> None:
    with pytest.raises(OmniNFTError, match="media"):
        decode(content)


def test_no_temporary_file_or_its_name_is_left(mp4: bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert decode(mp4).video.shape == (6, 32, 32, 3)
    with pytest.raises(OmniNFTError) as caught:
        decode(mp4[: len(mp4) // 2])
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_media_that_unfold_beyond_the_limit_are_refused_before_they_take_memory(tmp_path) -> None:
    """A file of some 50 kB with 180 MB of frames: black pictures compress well."""
    path = tmp_path / "bomb.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 2048, 1024, "yuv420p"
        frame = av.VideoFrame(2048, 1024, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for n in range(30):
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert len(content) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(OmniNFTError, match="more than the 10000000 bytes"):
            decode(content, Limits(bytes=10_000_000))
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(OmniNFTError, match="media"):  # one frame alone is too large: ffmpeg itself refuses it
        decode(content, Limits(bytes=2_000_000))


def only_documented_errors(body: bytes) -> None:
    """Parsing gives clips within the limits or a MessageError of one line, in memory that the body's length bounds."""
    limits, problem = Limits(bytes=1 << 20), "none"
    tracemalloc.start()
    try:
        clips = parse_message(body, limits)
        assert 1 <= len(clips) <= limits.clips
        for one in clips:
            if isinstance(one, Clip):
                require_within(one, limits)
                assert one.video.size + one.waveform.size <= len(body)
    except MessageError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000 + 8 * len(body)
    assert 0 < len(problem) < 1000


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.binary(max_size=600))
def test_random_bytes(body: bytes) -> None:
    only_documented_errors(body)


@FUZZ
@given(st.binary(max_size=300), st.integers(0, 400), st.binary(max_size=40))
def test_random_headers_of_the_right_length(header: bytes, length: int, data: bytes) -> None:
    only_documented_errors(struct.pack("<Q", len(header)) + header + data)
    only_documented_errors(struct.pack("<Q", length) + header + data)


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_mutated_messages(data: st.DataObject) -> None:
    """Bytes changed, removed, inserted and repeated, mostly where the header is."""
    body = bytearray(VALID)
    header = int.from_bytes(VALID[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.one_of(st.integers(0, header), st.integers(0, max(len(body) - 1, 0))))
        kind = data.draw(st.sampled_from(["change", "remove", "insert", "cut"]))
        if kind == "change" and place < len(body):
            body[place] = data.draw(st.sampled_from([0, 34, 44, 45, 48, 57, 91, 123, 125, 255]))
        elif kind == "remove":
            del body[place : place + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            body[place:place] = data.draw(st.binary(max_size=20))
        elif kind == "cut":
            del body[place:]
    only_documented_errors(bytes(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1]), max_size=5)


@FUZZ
@given(
    JSON,
    st.dictionaries(
        st.sampled_from(["0.video", "0.waveform", "0.media", "1.video", "x"]),
        st.tuples(st.sampled_from(["U8", "F32", "F64", "BOOL"]), SIZES, st.integers(0, 64), st.integers(0, 2**64 - 1)),
        max_size=4,
    ),
)
def test_well_formed_headers_that_lie(description: Any, tensors: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"omninft": json.dumps(description)}}
    for name, (dtype, shape, start, end) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    only_documented_errors(raw(header, b"\0" * 48))


FIELDS = ["kind", "id", "prompt_v", "prompt_a", "prompt_av", "category", "sample", "frame_rate", "sample_rate", "media"]


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.just(...), max_size=3))
def test_descriptions_with_other_values(change: dict[str, Any]) -> None:
    only_documented_errors(described([change]))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"format": ' + "9" * 5000 + "}"])
def test_deep_and_long_json(text: str) -> None:
    only_documented_errors(raw({"__metadata__": {"omninft": text}}))
    only_documented_errors(struct.pack("<Q", len(text)) + text.encode())


@settings(FUZZ, max_examples=60)
@given(st.data())
def test_mutated_media(mp4: bytes, data: st.DataObject) -> None:
    body = bytearray(mp4)
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(8, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = decode(bytes(body), Limits(bytes=1 << 20))
    except OmniNFTError:
        return
    assert read.video.nbytes + read.waveform.nbytes <= 1 << 20
