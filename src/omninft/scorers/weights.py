"""Released weights of judging models: where they lie, what fetches them, how they are read.

Nothing is ever downloaded here: a missing file is an error that holds the command which fetches it. Files with
pickles inside are read in this one place, by torch's restricted unpickler, after their checksum was compared, and
kept as safetensors from then on.
"""

from __future__ import annotations

import os
import pickle
import shlex
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omninft.files import file_sha256 as file_sha256  # a name of this module for those who read weights
from omninft.files import replacing
from omninft.hub import Need
from omninft.types import OmniNFTError

_SHOWN = 5  # keys named in an error
_SMALL = 10_000_000  # bytes of a tokenizer and the like, at most


def weights_folder() -> Path:
    """Where files that no hub cache holds are looked for: $OMNINFT_WEIGHTS, or ~/.cache/omninft/weights."""
    return Path(os.environ.get("OMNINFT_WEIGHTS", "~/.cache/omninft/weights")).expanduser()


@dataclass(frozen=True)
class JudgingModel:
    """What is known of a judging model before it is loaded.

    `files` are all files needed, relative to the repository or folder. They come from a hub repository (`repo` at the
    pinned `revision`), from `url` (a prefix that the file name is appended to), or inside an installed `package`, in
    which case `files` is empty. `sha256` has the published checksums. `commercial` says whether the licences of weights
    and code allow commercial use; where a licence is not certain it is False. `verified` is True once our scores were
    compared with official ones of the released weights.
    """

    name: str
    parameters: int  # 0 where unknown
    licence: str
    commercial: bool
    files: tuple[str, ...] = ()
    repo: str | None = None
    revision: str | None = None
    url: str | None = None
    package: str | None = None
    sha256: Mapping[str, str] | None = None
    verified: bool = False

    def find(self, file: str, path: str | Path | None = None) -> Path | None:
        """The local copy of one file: under `path` (a folder, or the file itself), else in the caches; or None."""
        if path is not None:
            base = Path(path).expanduser()
            places = [base] if base.is_file() and len(self.files) == 1 else [base / file, base / Path(file).name]
        elif self.repo is not None:
            cached = try_to_load_from_cache(self.repo, file, revision=self.revision)
            places = [Path(cached)] if isinstance(cached, str) else []
        else:
            places = [weights_folder() / Path(file).name]
        return next((place for place in places if place.is_file()), None)

    def need(self, path: str | Path | None = None, more: tuple[str, ...] = ()) -> Need:
        """What `omninft fetch` fetches: `files` and the patterns `more`. Sizes go by the number of parameters."""
        weights = any(Path(file).suffix in (".safetensors", ".pth", ".pt", ".bin") for file in (*self.files, *more))
        # Small models are released in float32, large ones in bfloat16.
        each = (4 if self.parameters < 1e9 else 2) if weights else 0
        folder = Path(path).expanduser() if path is not None else None if self.repo is not None else weights_folder()
        return Need(
            name=self.name,
            licence=self.licence,
            files=(*self.files, *more),
            missing=(*(file for file in self.files if self.find(file, path) is None), *more),
            about=max(self.parameters * each, _SMALL),
            repo=self.repo,
            revision=self.revision,
            url=self.url,
            sha256=self.sha256 or {},
            folder=folder,
        )

    def missing(self, path: str | Path | None = None) -> str | None:
        """None when everything is there, else what is missing and the command that fetches it."""
        lacking = [file for file in self.files if self.find(file, path) is None]
        if not lacking:
            return None
        where = f" in {path}" if path is not None else ""
        listed = ", ".join(lacking[:_SHOWN]) + (f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else "")
        return f"{self.name}: missing {listed}{where}; fetch by: {self.fetch_command(lacking, path)}"

    def fetch_command(self, files: list[str] | None = None, path: str | Path | None = None) -> str:
        """One shell line that puts the files (all, if not given) where `find` looks for them."""
        files = list(self.files if files is None else files)
        if self.repo is not None:
            words = ["hf", "download", self.repo, *files, "--revision", self.revision or "main"]
            words += ["--local-dir", str(path)] if path is not None else []
            return shlex.join(words)
        folder = Path(path).expanduser() if path is not None else weights_folder()
        lines = [
            shlex.join(["curl", "-L", "--create-dirs", "-o", str(folder / Path(f).name), f"{self.url}{f}"])
            for f in files
        ]
        return " && ".join(lines)

    def locate(self, path: str | Path | None = None) -> dict[str, Path]:
        """All files by name.

        Raises:
            OmniNFTError: what is missing, and the command that fetches it.
        """
        missing = self.missing(path)
        if missing is not None:
            raise OmniNFTError(missing)
        found = {file: self.find(file, path) for file in self.files}
        return {file: place for file, place in found.items() if place is not None}

    def state(self, file: str, path: str | Path | None = None) -> dict[str, Tensor]:
        """The state dict in one of the files, its checksum compared where one is published."""
        return read_state(self.locate(path)[file], (self.sha256 or {}).get(file))


def read_state(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from .pt, .pth, .bin without running anything pickled.

    A state dict wrapped under "state_dict" or "model" is unwrapped. What was read from a pickled file is kept as
    safetensors under `weights_folder()/converted`, named by the file's checksum, and read from there the next time.

    Raises:
        OmniNFTError: another checksum than `sha256`; a file that is damaged, needs full unpickling, or holds no
            state dict.
    """
    if not path.is_file():
        raise OmniNFTError(f"{path}: cannot be read: no such file")
    if sha256 is not None or path.suffix != ".safetensors":
        found = file_sha256(path)
        if sha256 is not None and found != sha256:
            raise OmniNFTError(f"{path}: sha256 is {found}, expected {sha256}: damaged, or another release")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    converted = weights_folder() / "converted" / f"{found}.safetensors"
    if converted.is_file():
        return _safetensors(converted)
    try:
        # Files of before torch 1.6 are no archives and cannot be mapped.
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        why = " ".join(str(error).split())[:300]
        raise OmniNFTError(f"{path}: needs full unpickling, which could run code, and is refused ({why})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the unpickler of a damaged file ends in whatever its instructions raise
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise OmniNFTError(f"{path}: not a file of torch.save, or damaged ({why})") from error
    state = _unwrapped(tree, path)
    try:
        with replacing(converted) as temporary:
            # Tied tensors share memory, which safetensors refuses.
            save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, temporary)
    except (OmniNFTError, SafetensorError):  # a full disk is one or the other
        return state  # the copy only saves time
    return _safetensors(converted)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], where: str, assign: bool = False) -> None:
    """Load a state dict whose names and shapes must be the model's, all of them.

    `assign` puts the given tensors in place of the model's (a model built without memory) instead of copying them.

    Raises:
        OmniNFTError: names the first of the missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} ({list(state[k].shape)}, expected {list(own[k].shape)})"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    listed = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if listed:
        raise OmniNFTError(f"{where} does not fit the model: {'; '.join(listed)}")
    model.load_state_dict(dict(state), assign=assign)


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The state under the names that `rename` gives; None drops an entry."""
    names = {old: rename(old) for old in state}
    return {new: state[old] for old, new in names.items() if new is not None}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise OmniNFTError(f"{path}: not a safetensors file, or damaged ({error})") from error


def _unwrapped(tree: object, path: Path) -> dict[str, Tensor]:
    for _ in range(2):
        if isinstance(tree, dict) and not any(isinstance(value, Tensor) for value in tree.values()):
            tree = next((tree[key] for key in ("state_dict", "model") if key in tree), tree)
    if not isinstance(tree, dict) or not tree:
        raise OmniNFTError(f"{path}: holds no state dict")
    state = {name: value for name, value in tree.items() if isinstance(value, Tensor)}
    if not state:
        raise OmniNFTError(f"{path}: holds no state dict; found the keys {', '.join(map(str, list(tree)[:_SHOWN]))}")
    return state
