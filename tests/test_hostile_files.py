"""Every reader of files against contents that nobody meant for it: it loads something valid, or says on a line or two
which file is wrong; within two seconds, and without filling the memory."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save

from omninft.checkpoint.store import CheckpointStore
from omninft.clips.first_frame import read_first_frame
from omninft.clips.journal import Journal
from omninft.clips.listing import ListedClip, read_listing, write_listing
from omninft.clips.media import read_clip, read_wav, write_clip, write_png, write_wav
from omninft.config import ModelConfig, load_config
from omninft.evaluation.held_out import EvaluationScores, load_scores, save_scores
from omninft.evaluation.paired import Measure, compare_paired
from omninft.evaluation.results import EvaluationResult, Metric, MetricResult, Protocol
from omninft.evaluation.settings import read_settings
from omninft.evaluation.vbench_results import read_official
from omninft.evaluation.vbench_suite import read_mapping, read_suite
from omninft.export.lora import METADATA_KEY, read_lora
from omninft.gallery import plots
from omninft.gallery.report import write_report
from omninft.gallery.run_folder import read_run_folder
from omninft.models.loading import load_pipeline, read_clip_defaults
from omninft.prompts.prompt_file import read_prompt_file
from omninft.runs.metrics import MetricsLog
from omninft.scorers.weights import read_state
from omninft.types import Clip, OmniNFTError, Prompt

SECONDS, MEGABYTES, LINES = 2.0, 200, 3


def png(width: int, height: int) -> bytes:
    """A picture that is all header."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    data = struct.pack(">I", len(pixels) - 4) + pixels + struct.pack(">I", zlib.crc32(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + data


def wav(declared: int) -> bytes:
    return b"RIFF\xff\xff\xff\x7fWAVEfmt \x10\0\0\0\1\0\2\0\x80\xbb\0\0\0\xee\2\0\4\0\x10\0data" + struct.pack(
        "<I", declared
    )


def safetensors(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ABOUT = {METADATA_KEY: json.dumps({"rank": 2, "alpha": 4, "targets": ["to_q"]})}
LORA_A = "diffusion_model.b.to_q.lora_A.weight"
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t\n",
    "zero bytes": bytes(64),
    "text": b"nothing that any reader waits for, over one line\nand another",
    "UTF-16": "prompt_v,prompt_a\nrain,drops\n".encode("utf-16"),
    "latin-1": "prompt: caf\xe9\n".encode("latin-1"),
    "zero byte in JSON": b'{"prompt_v": "a\\u0000b", "prompt_a": "c"}',
    "brackets": b"[" * 10_000 + b"]" * 10_000,
    "open brackets": b"[" * 100_000,
    "braces": b'{"clips":' * 10_000 + b"1" + b"}" * 10_000,
    "aliases": BOMB.encode(),
    "alias of itself": b"a: &a [*a]\n",
    "YAML of odd types": b"1: 2\n? [a]\n: !!bool x\n",
    "YAML of odd values": b"run: [1]\nsampling: {num_steps: many}\nprompts: 3\nseed: .inf\nrewards: 7\nbase: [1]\n",
    "YAML of odd mappings": b"model: {lora: {rank: {a: b}}}\nrun: {iterations: [1], name: ../../x}\n",
    "YAML with a date": b"recipe: 2001-99-99\n",
    "YAML with an object": b"!!python/object/apply:os.system [id]\n",
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"1e400",
    "no number": b"NaN",
    "a text": b'"text"',
    "many digits": b'{"clips": ' + b"9" * 5000 + b"}",
    "a long text": b'{"prompt_v": "' + b"x" * 10_000_000 + b'", "prompt_a": "y"}',
    "a long line": b"x" * 10_000_000,
    "many keys": json.dumps({f"k{n}": n for n in range(20_000)}).encode(),
    "many columns": (",".join(f"k{n}" for n in range(20_000)) + "\n").encode(),
    "keys twice": b'{"prompt": "x", "prompt": "y"}',
    "an open quote": b'prompt_v,prompt_a\n"rain,drops\n' * 50,
    "odd clips": b'{"clips": [3, null, []]}',
    "clips elsewhere": b'{"clips": [{"file": "../../etc/x.mp4", "prompt_id": "a"}]}',
    "clips at a root": b'{"clips": [{"file": "/etc/x.mp4", "prompt_id": "a"}]}',
    "clips of no name": b'{"clips": [{"file": "a\\u0000b.mp4", "prompt_id": "a"}]}',
    "odd rows": b'{"rows": [{}], "resamples": "x", "confidence": [], "seed": null}',
    "odd result": b'{"format": 1, "system": [], "protocol": {}, "metrics": 3, "overall": [], "clips": "x"}',
    "odd scores": b'{"names": ["a"], "prompt_ids": ["b", "c"], "values": [["x"], [1, 2]]}',
    "odd suite": b'[{"prompt_en": 3, "dimension": 4}, 5]',
    "odd mapping": b'{"a prompt": 3, "another": {"x": []}}',
    "odd dimensions": b'{"scene": [1e999, [[]]], "color": {}}',
    "odd manifest": b'{"format": 1, "files": {"../x": 3}, "step": "x", "sha256": "0"}',
    "odd metrics": b'{"kind": "iteration", "iteration": "x", "a": "3"}\n{"kind": "iteration", "iteration": [1]}\n'
    b'{"kind": "evaluation", "iteration": 1, "split": 3, "measures": [1]}\n{"kind": "event"}\n{"iteration": 1e400}\n'
    b'{"kind": "iteration", "iteration": 0, "reward/a": 1e400, "b": {"c": 1}}\n{"kind": ["x"], "iteration": 0}\n',
    "huge header": safetensors(b"{}", 2**60),
    "cut header": safetensors(b'{"a": {"dtype"', 500),
    "header of no JSON": safetensors(b"[[[["),
    "deep header": safetensors(b"[" * 10_000),
    "no tensor": save({}, ABOUT),
    "wrong shape": save({LORA_A: torch.zeros(3, 4)}, ABOUT),
    "wrong rank": save({LORA_A: torch.zeros(4)}, ABOUT),
    "wrong dtype": save({LORA_A: torch.zeros(2, 4, dtype=torch.int8)}, ABOUT),
    "not finite": save({LORA_A: torch.full((2, 4), torch.nan)}, ABOUT),
    "other tensors": save({"x": torch.zeros(2)}),
    "rank of a billion": save({LORA_A: torch.zeros(2, 4)}, {METADATA_KEY: '{"rank": 1e9, "alpha": 1, "targets": []}'}),
    "odd metadata": save({LORA_A: torch.zeros(2, 4)}, {METADATA_KEY: "[" * 10_000}),
    "an archive": b"PK\x03\x04" + bytes(200),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "a box without end": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom\xff\xff\xff\xffmoov",
    "a large picture": png(60_000, 60_000),
    "a wide picture": png(2**31 - 1, 1),
    "a picture of nothing": png(0, 0),
    "a long sound": wav(0xFFFFFFFE),
    "a sound without end": wav(0xFFFFFFFF),
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
}


@dataclass(frozen=True)
class Loader:
    """What reads a file of this name; `valid` is one that it takes, for mutations of it."""

    file: str
    load: Callable[[Path], Any]
    valid: Callable[[Path], object] | None = None
    tells: bool = True  # by an error; a report lists what it could not read instead
    passes: frozenset[str] = field(default_factory=frozenset)  # places other than files that are as good as no file


def _clip() -> Clip:
    video = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    return Clip(video, 8.0, np.zeros((1, 12_000), np.float32), 16_000, Prompt("a", "", "", ""))


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _checkpoint(path: Path) -> None:
    saved = CheckpointStore(path.parent / "run", 1).save(0, {"a": {"w": torch.ones(3)}}, {"b": 1.5}, {})
    for file in saved.iterdir():
        os.replace(file, path.parent / file.name)


def _result(path: Path) -> None:
    metric, protocol = Metric("a", "A", "of a"), Protocol("world", "1", {"x": 1})
    EvaluationResult("s" * 2000, protocol, (metric,), {"a": MetricResult(1.0)}, {}, ()).save(path.parent)


def _evaluation(path: Path) -> None:
    scores = np.arange(6.0).reshape(6, 1)
    path.write_text(
        compare_paired([Measure("m", "trained")], scores, scores + 1, list("aabbcc"), resamples=9).to_json()
    )


def _run(path: Path) -> None:
    for told in read_run_folder(path.parent).problems:
        assert path.name in told
        assert told.count("\n") < LINES


def _weights(path: Path) -> None:
    torch.save({"w": torch.ones(3)}, path)


METRICS = "".join(
    json.dumps(row) + "\n"
    for row in (
        {"kind": "iteration", "iteration": 0, "reward/sync": 0.5, "loss": 1.0, "gradient_norm/video": 2.0},
        {"kind": "evaluation", "split": "dev", "iteration": 0, "measures": {"sync": {"mean": 1, "low": 0, "high": 2}}},
        {"kind": "event", "iteration": 0, "level": "warning", "message": "a warning"},
    )
)
LISTING_TEXT = '{"clips": [{"file": "a.mp4", "prompt_id": "a", "prompt_v": "b", "sample": 0, "scores": {"x": 1.0}}]}'
LOADERS = {
    "txt": Loader("p.txt", read_prompt_file, _text("a ball\na drum\n")),
    "csv": Loader("p.csv", read_prompt_file, _text('prompt_v,prompt_a\n"a, b",c\n')),
    "jsonl": Loader("p.jsonl", read_prompt_file, _text('{"prompt_v": "a", "prompt_a": "b", "id": 3}\n')),
    "recipe": Loader("r.yaml", lambda path: load_config(str(path)), _text("base: gdpo\nrun: {iterations: 7}\n")),
    "config of a run": Loader("config.yaml", _run, _text("recipe: x\nrun: {iterations: 3}\n"), tells=False),
    "metrics": Loader("metrics.jsonl", _run, _text(METRICS), tells=False),
    "evaluation": Loader("evaluation.json", _run, _evaluation, tells=False),
    "listing": Loader("scores.json", read_listing, _text(LISTING_TEXT)),
    "result": Loader("result.json", EvaluationResult.load, _result),
    "scores": Loader("values.json", load_scores, _text('{"names": ["a"], "prompt_ids": ["b"], "values": [[null]]}')),
    "settings": Loader(
        "settings.json", lambda path: read_settings(path.parent), passes=frozenset({"folder", "pipe", "loop"})
    ),
    "journal": Loader(
        "j.jsonl", lambda path: Journal(path, {"a": 1}, "work").read(), _text('{"a": 1}\n'), passes=frozenset({"loop"})
    ),
    "suite": Loader("VBench_full_info.json", read_suite, _text('[{"prompt_en": "a", "dimension": ["scene"]}]')),
    "mapping": Loader("m.json", read_mapping, _text('{"a": ["b.mp4"]}')),
    "official": Loader(
        "x_eval_results.json",
        lambda path: read_official([path], "s"),
        _text('{"scene": [0.5, [{"video_path": "a-0.mp4", "video_results": 0.5}]]}'),
    ),
    "LoRA": Loader("l.safetensors", read_lora, lambda path: path.write_bytes(save({LORA_A: torch.ones(2, 4)}, ABOUT))),
    "manifest": Loader("manifest.json", lambda path: CheckpointStore(path, 1).load(path.parent, None), _checkpoint),
    "weights": Loader("w.safetensors", read_state, lambda path: path.write_bytes(save({"w": torch.ones(2)}))),
    "pickled weights": Loader("w.pt", read_state, _weights),
    "sizes of clips": Loader(
        "clip_defaults.json",
        lambda path: read_clip_defaults(str(path.parent)),
        _text('{"num_frames": 9, "height": 32, "width": 32, "frame_rate": 8.0}'),
        passes=frozenset({"loop"}),
    ),
    "pipeline": Loader(
        "model_index.json", lambda path: load_pipeline(ModelConfig(path=str(path.parent), device="cpu"))
    ),
    "video": Loader("v.mp4", read_clip, lambda path: write_clip(path, _clip())),
    "sound": Loader("s.wav", read_wav, lambda path: write_wav(path, np.zeros((1, 800), np.float32), 8000)),
    "first frame": Loader(
        "f.png", lambda path: read_first_frame(str(path), 8, 8), lambda path: write_png(path, _clip().video[0])
    ),
}


def mutations(content: bytes, rng: random.Random, count: int = 6) -> dict[str, bytes]:
    """Cut, with bytes changed, and with a piece twice."""
    made = {}
    for number in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        at = rng.randrange(len(content))
        piece = content[at : at + rng.randint(1, 40)]
        made |= {f"changed {number}": bytes(changed), f"cut {number}": content[:at]}
        made |= {f"twice {number}": content[:at] + piece + content[at:]}
    return made


def problem(loader: Loader, path: Path) -> str | None:
    """What is wrong with how the file at `path` was taken."""
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    wrong = None
    try:
        loader.load(path)
    except OmniNFTError as error:
        message = str(error)
        known = path.name if path.name != "model_index.json" else path.parent.name
        if known not in message or message.count("\n") >= LINES or len(message) > 2000:
            wrong = f"said {message[:300]!r}"
    except Exception as error:  # noqa: BLE001
        wrong = f"raised {type(error).__name__}: {error}"[:300]
    seconds = time.process_time() - begin
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    if seconds > SECONDS or megabytes > MEGABYTES:
        wrong = f"took {seconds:.1f} s and {megabytes:.0f} MB; {wrong}"
    return wrong


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "weights"))


@pytest.mark.parametrize("name", LOADERS)
def test_no_content_is_too_odd(tmp_path: Path, name: str) -> None:
    loader = LOADERS[name]
    contents = dict(CONTENTS)
    rng = random.Random(name)
    contents |= {f"random {n}": rng.randbytes(rng.randint(1, 3000)) for n in range(3)}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / loader.file
    if loader.valid is not None:
        loader.valid(path)
        loader.load(path)
        contents |= mutations(path.read_bytes(), rng)
    problems = {}
    for what, content in contents.items():
        path.write_bytes(content)
        if (wrong := problem(loader, path)) is not None:
            problems[what] = wrong
    assert not problems


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    loader = LOADERS[name]
    places: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir,
        "pipe": lambda path: os.mkfifo(path),
        "loop": lambda path: path.symlink_to(path.name),
    }
    problems = {}
    for what, make in places.items():
        path = tmp_path / what / loader.file
        path.parent.mkdir()
        make(path)
        if (wrong := problem(loader, path)) is not None:
            problems[what] = wrong
        elif loader.tells and what not in loader.passes:
            with pytest.raises(OmniNFTError):
                loader.load(path)
    assert not problems


def test_reports_tell_of_runs_whose_files_are_odd(tmp_path: Path) -> None:
    rng = random.Random(0)
    contents = {what: [content] * 3 for what, content in CONTENTS.items() if "odd" in what}
    files = [LOADERS[name] for name in ("config of a run", "metrics", "evaluation")]
    for loader in files:
        assert loader.valid is not None
        loader.valid(tmp_path / loader.file)
    valid = [list(mutations((tmp_path / loader.file).read_bytes(), rng, 3).values()) for loader in files]
    contents |= {f"mutation {n}": list(some) for n, some in enumerate(zip(*valid, strict=True))}
    for what, some in contents.items():
        for loader, content in zip(files, some, strict=True):
            (tmp_path / loader.file).write_bytes(content)
        assert write_report(tmp_path).is_file(), what


def test_there_are_enough_of_both() -> None:
    assert len(CONTENTS) >= 25
    assert len(LOADERS) * len(CONTENTS) >= 200


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "clip": ("a.mp4", lambda path: write_clip(path, _clip())),
    "sound": ("a.wav", lambda path: write_wav(path, np.zeros((1, 8000), np.float32), 8000)),
    "picture": ("a.png", lambda path: write_png(path, _clip().video[0])),
    "result": ("result.json", _result),
    "listing": ("scores.json", lambda path: write_listing(path.parent, [ListedClip("x" * 4000, Prompt(*"abcd"))])),
    "report": ("report.html", lambda path: write_report(path.parent)),
    "scores": (
        "values.json",
        lambda path: save_scores(path, EvaluationScores(("a",), np.ones((999, 1)), ("p",) * 999)),
    ),
    "checkpoint": (
        "step-000000",
        lambda path: CheckpointStore(path.parent, 1).save(0, {"a": {"w": torch.ones(2000)}}, {}, {}),
    ),
    "journal": ("j.jsonl", lambda path: _journal(path)),
    "figure": ("fig.png", lambda path: plots.save_figure(Figure(), path.with_suffix(""))),
    "metrics": ("metrics.jsonl", lambda path: _log(path)),
}


def _journal(path: Path) -> None:
    with Journal(path, {}, "work") as journal:
        journal.resume(lambda _: True)
        journal.add({"x": "x" * 4000})


def _log(path: Path) -> None:
    with MetricsLog(path.parent) as log:
        log.event(0, "info", "x" * 4000)


@pytest.fixture
def files_of_a_kilobyte() -> Iterator[None]:
    """No file grows beyond that: writes end in an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, signal_before)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("files_of_a_kilobyte")
def test_what_cannot_be_written_is_named_and_leaves_nothing_half(tmp_path: Path, name: str) -> None:
    file, write = WRITERS[name]
    with pytest.raises(OmniNFTError, match=file):
        write(tmp_path / file)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    assert left == []
