"""VBench's prompt suite and the folder of clips that its package reads: `{prompt}-{0..4}.mp4`, nothing else in it.

The suite is a file of the `vbench` wheel (Apache-2.0), which is not part of this package: it is read where the user
has it, in an installed or unpacked package, in the wheel itself, or as a copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omninft.clips.listing import read_listing
from omninft.evaluation.vbench import BY_NAME, chosen_dimensions
from omninft.files import MOST_BYTES, parse_json, read_bytes, read_json, replacing
from omninft.types import OmniNFTError

SUITE_FILE = "VBench_full_info.json"
WHEEL = "vbench==0.1.5"
FETCH = f"pip download --no-deps {WHEEL}"
SAMPLES = 5  # clips of a prompt that the official package looks for
LONGEST_NAME = 255  # bytes of a file name that common file systems store
_MEMBER = f"vbench/{SUITE_FILE}"


@dataclass(frozen=True)
class SuitePrompt:
    """One entry; a text may be the prompt of two entries, with different dimensions."""

    text: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] | None = None  # what some dimensions check: object, colour, style, ...


@dataclass(frozen=True)
class Suite:
    """The prompts, in the order of the file."""

    entries: tuple[SuitePrompt, ...]
    digest: str  # 12 hexadecimal digits of the file's SHA-256

    def counts(self) -> dict[str, int]:
        """Entries per dimension."""
        return dict(Counter(name for entry in self.entries for name in entry.dimensions))

    def prompts(self, dimensions: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
        """Different prompts that any of the dimensions (default: all) uses, with those of them that do.

        Raises:
            OmniNFTError: a dimension that VBench has not.
        """
        wanted = {d.name for d in chosen_dimensions(list(BY_NAME if dimensions is None else dimensions))}
        found: dict[str, tuple[str, ...]] = {}
        for entry in self.entries:
            used = tuple(name for name in entry.dimensions if name in wanted)
            if used:
                found[entry.text] = (*found.get(entry.text, ()), *used)
        return found

    def full_info(self, folder: Path, dimensions: Sequence[str]) -> list[dict[str, Any]]:
        """The content of `<name>_full_info.json`: entries of the dimensions with the clips that are there."""
        wanted = {d.name for d in chosen_dimensions(dimensions)}
        there = set(os.listdir(folder))
        tree = []
        for entry in self.entries:
            if wanted & set(entry.dimensions):
                clips = [name for name in clip_names(entry.text) if name in there]
                item: dict[str, Any] = {"prompt_en": entry.text, "dimension": list(entry.dimensions)}
                if entry.auxiliary is not None:
                    item["auxiliary_info"] = entry.auxiliary
                tree.append({**item, "video_list": [str(folder / name) for name in clips]})
        return tree


def read_suite(source: Path | None = None) -> Suite:
    """From the file, a wheel, or a folder that holds either or the unpacked package; default: an installed `vbench`.

    Raises:
        OmniNFTError: not found (with the command that fetches it), or not such a file.
    """
    raw, where = _suite_bytes(source)
    try:
        tree = parse_json(raw.decode("utf-8-sig"))
        entries = tuple(SuitePrompt(e["prompt_en"], tuple(e["dimension"]), e.get("auxiliary_info")) for e in tree)
        if not entries or not all(isinstance(e.text, str) and e.text.strip() for e in entries):
            raise ValueError("no prompts, or an empty one")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OmniNFTError(
            f"{where}: not VBench's prompt suite ({type(error).__name__}: {error}); expected a list of "
            '{"prompt_en": ..., "dimension": [...]}'
        ) from error
    unknown = sorted({name for entry in entries for name in entry.dimensions} - set(BY_NAME))
    if unknown:
        raise OmniNFTError(f"{where}: dimensions that VBench 0.1.5 has not: {', '.join(unknown):.200}")
    return Suite(entries, hashlib.sha256(raw).hexdigest()[:12])


def clip_name(prompt: str, sample: int) -> str:
    """The file name that the official package looks for.

    Raises:
        OmniNFTError: the prompt cannot be a file name, and why.
    """
    name = f"{prompt}-{sample}.mp4"
    size = len(name.encode("utf-8"))
    if "/" in prompt or "\0" in prompt:
        raise OmniNFTError(f"prompt {prompt!r} holds a slash or a zero byte and cannot be a file name, as VBench needs")
    if size > LONGEST_NAME:
        raise OmniNFTError(
            f"prompt {prompt[:60]!r}...: the file name that VBench needs has {size} bytes, file systems store at most "
            f"{LONGEST_NAME}; shorten the prompt or use custom input with a prompt file"
        )
    return name


def clip_names(prompt: str, samples: int = SAMPLES) -> list[str]:
    """`clip_name` of the samples from 0."""
    return [clip_name(prompt, sample) for sample in range(samples)]


def prompt_of(file: str | Path) -> str:
    """The prompt that the official package reads from a file name: the stem without `-<digits>` at its end."""
    return re.sub(r"-\d+$", "", Path(file).stem)


@dataclass(frozen=True)
class Export:
    """What a folder holds after an export."""

    folder: Path
    written: int  # clips put there or found there as they should be
    missing: tuple[str, ...]  # file names that the suite needs and that are not there
    unknown: tuple[str, ...]  # prompts of the mapping that the suite has not


def export_clips(
    suite: Suite,
    clips: Mapping[str, Sequence[Path]],
    folder: Path,
    dimensions: Sequence[str] | None = None,
    samples: int = SAMPLES,
    copy: bool = False,
) -> Export:
    """Put clips of the suite's prompts under the official names, by hard links (or copies where those cannot be).

    `clips` has, per prompt, its clips in the order of their samples; further ones than `samples` are left out.

    Raises:
        OmniNFTError: a clip that does not exist or is no mp4, a prompt that cannot be a file name, or a folder that
            tells no large letters from small ones where two prompts differ in nothing else.
    """
    prompts = suite.prompts(dimensions)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for prompt, sources in clips.items():
        if prompt not in prompts:
            continue
        for sample, source in enumerate(sources[:samples]):
            name = clip_name(prompt, sample)
            if not source.is_file() or source.suffix.lower() != ".mp4":
                raise OmniNFTError(f"{source}: no such mp4 file; it is to be sample {sample} of {prompt!r}")
            twin = written.setdefault(name.casefold(), folder / name)
            if twin.name != name and (folder / name).exists() and twin.samefile(folder / name):
                raise OmniNFTError(
                    f"{folder} tells no large letters from small ones, and {twin.name!r} and {name!r} are two clips of "
                    "the suite; export to a file system that does"
                )
            _place(source, folder / name, copy)
    there = set(os.listdir(folder))
    needed = [name for prompt in prompts for name in clip_names(prompt, samples)]
    missing = tuple(name for name in needed if name not in there)
    return Export(folder, len(needed) - len(missing), missing, tuple(p for p in clips if p not in suite.prompts()))


def read_mapping(path: Path) -> dict[str, list[Path]]:
    """Clips per prompt: a JSON file {prompt: [path, ...]}, or a folder of `omninft sample` (by its scores.json).

    Paths are relative to the file.

    Raises:
        OmniNFTError: no such file, or not such a mapping.
    """
    if path.is_dir():
        found: dict[str, list[tuple[int, Path]]] = {}
        for listed in read_listing(path):
            found.setdefault(listed.prompt.prompt_av, []).append((listed.sample, path / listed.file))
        return {prompt: [clip for _, clip in sorted(numbered)] for prompt, numbered in found.items()}
    tree = read_json(path, "not clips per prompt: ")
    entries = list(tree.items()) if isinstance(tree, dict) else [("", tree)]
    for prompt, clips in entries:
        if not isinstance(clips, list) or not all(isinstance(clip, str) for clip in clips):
            raise OmniNFTError(
                f'{path}: not a mapping {{"prompt": ["clip.mp4", ...]}}: found {clips!r:.60} of {prompt!r:.60}'
            )
    return {prompt: [path.parent / clip for clip in clips] for prompt, clips in entries}


def strangers(folder: Path) -> list[str]:
    """Entries of a folder that are no mp4 file: the official package takes the ending of all clips from any of them."""
    return sorted(entry.name for entry in os.scandir(folder) if not (entry.is_file() and entry.name.endswith(".mp4")))


def _place(source: Path, target: Path, copy: bool) -> None:
    if target.exists() and target.samefile(source):
        return
    with replacing(target) as temporary:
        if not copy:
            try:
                os.link(source, temporary)
                return
            except OSError:  # another file system, or one without hard links
                pass
        shutil.copyfile(source, temporary)


def _suite_bytes(source: Path | None) -> tuple[bytes, str]:
    if source is None:
        found = importlib.util.find_spec("vbench")
        folders = list(found.submodule_search_locations or ()) if found is not None else []
        if not folders:
            raise OmniNFTError(f"VBench's prompt suite is not here; fetch it by: {FETCH}, and give the wheel's path")
        source = Path(folders[0])
    places = [source]
    if source.is_dir():
        places = [source / SUITE_FILE, source / _MEMBER, *sorted(source.glob("vbench-*.whl"), reverse=True)]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise OmniNFTError(f"{source}: no {SUITE_FILE} or vbench wheel there; fetch it by: {FETCH}")
    if not zipfile.is_zipfile(file):
        return read_bytes(file), str(file)
    with zipfile.ZipFile(file) as wheel:
        if _MEMBER not in wheel.namelist():
            raise OmniNFTError(f"{file}: no {_MEMBER} in it; expected the wheel of {WHEEL}, fetched by: {FETCH}")
        size = wheel.getinfo(_MEMBER).file_size
        if size > MOST_BYTES:
            raise OmniNFTError(f"{file}: {_MEMBER} unfolds to {size} bytes, expected at most {MOST_BYTES}")
        return wheel.read(_MEMBER), f"{file}:{_MEMBER}"
