"""Files that a run loads and the package does not hold: what they are, and how they get onto this machine.

Only `omninft fetch` downloads, by huggingface_hub: what was broken off goes on, what is there is not fetched again, and
what arrived is compared with the checksum that its repository or this package states.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get

from omninft.files import file_sha256
from omninft.types import OmniNFTError

_SECONDS = 20.0  # that the hub may take to answer what is in a repository
_SPARE = 2**30  # bytes of a disk that stay free


@dataclass(frozen=True)
class Need:
    """One thing that a run loads: a component of a model, or the files of a judge."""

    name: str
    licence: str
    files: tuple[str, ...]  # names in the repository or after `url`, or patterns ("transformer/*")
    missing: tuple[str, ...]  # those that are not on this machine
    about: int  # bytes, by the number of parameters
    repo: str | None = None
    revision: str | None = None
    url: str | None = None  # prefix of what no hub repository holds
    sha256: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None  # where they go; None: the hub's cache
    gated: bool = False  # as far as this package knows

    @property
    def place(self) -> Path:
        """Where they lie, or will."""
        return self.folder if self.folder is not None else Path(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch."""

    need: Need
    name: str
    size: int  # bytes
    sha256: str | None = None

    @property
    def label(self) -> str:
        return f"{self.need.repo}/{self.name}" if self.need.repo is not None else f"{self.need.url}{self.name}"


def describe_missing(needs: Sequence[Need], command: str) -> str | None:
    """What is not on this machine, with sizes and the command that fetches it; None when everything is."""
    lacking = [need for need in needs if need.missing]
    if not lacking:
        return None
    listed = ", ".join(f"{need.name} (about {size_text(need.about)})" for need in lacking)
    return f"not on this machine: {listed}; `{command}` fetches them"


def size_text(num_bytes: float) -> str:
    """Decimal units, as disks and the hub count: "37.8 GB", "2 MB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{max(1, round(num_bytes / 1e6))} MB"


def ask_hub(needs: Sequence[Need]) -> tuple[list[RemoteFile], dict[str, bool]]:
    """The files of `needs` that are not here, as their repositories list them now, and which repositories are gated.

    A repository is asked once. What comes from a web address has the size that the package knows.

    Raises:
        OmniNFTError: a repository that is not there or not reachable, or lacks a file.
        OfflineError: no connection.
    """
    files: list[RemoteFile] = []
    gated: dict[str, bool] = {}
    infos: dict[tuple[str, str | None], Any] = {}
    for need in needs:
        if not need.missing:
            continue
        if need.repo is None:
            share = need.about // max(1, len(need.missing))
            files += [RemoteFile(need, name, share, need.sha256.get(name)) for name in need.missing]
            continue
        key = need.repo, need.revision
        if key not in infos:
            infos[key] = _translated(need.repo, functools.partial(_model_info, need))
        info = infos[key]
        gated[need.repo] = bool(info.gated)
        listed = {sibling.rfilename: sibling for sibling in info.siblings}
        for pattern in need.files:
            names = [name for name in fnmatch.filter(listed, pattern) if name == pattern or is_loaded(name)]
            if not names:
                raise OmniNFTError(f"{need.repo} holds no {pattern} (revision {need.revision or 'main'})")
            for name in names:
                if _is_here(need, name, info.sha):
                    continue
                lfs = listed[name].lfs
                known = need.sha256.get(name) or (lfs.sha256 if lfs is not None else None)
                files.append(RemoteFile(need, name, int(listed[name].size or 0), known))
    return files, gated


def is_loaded(name: str) -> bool:
    """Whether a file of a component's folder is read: no pickles, no weights of another precision, no pictures."""
    path = Path(name)
    variant = any(f".{name}" in path.name for name in ("fp16", "bf16", "fp8", "fp32", "non_ema"))
    return path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja") and not variant


def require_space(files: Sequence[RemoteFile]) -> None:
    """Refuse what the disks have no room for, a GiB to spare.

    Raises:
        OmniNFTError: the place, what is to come and what is free.
    """
    wanted: dict[int, int] = {}
    places: dict[int, Path] = {}
    for file in files:
        place = file.need.place.absolute()
        existing = next(p for p in (place, *place.parents) if p.exists())
        device = existing.stat().st_dev
        wanted[device] = wanted.get(device, 0) + file.size
        places.setdefault(device, place)
    for device, num_bytes in wanted.items():
        place = places[device]
        existing = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if num_bytes + _SPARE > free:
            raise OmniNFTError(
                f"{place}: {size_text(num_bytes)} to fetch and 1.1 GB to spare, {size_text(free)} free; "
                "HF_HOME (hub cache) or OMNINFT_WEIGHTS (other files) names a larger disk"
            )


def fetch(file: RemoteFile) -> Path:
    """Download one file, or go on with it, and compare its checksum where one is known.

    Raises:
        OmniNFTError: gated, not there, not reachable, or damaged; a damaged file is deleted.
    """
    need = file.need
    if need.repo is not None:
        path = Path(_translated(need.repo, lambda: _from_hub(file)))
    else:
        path = _translated(file.label, lambda: _from_web(file))
    if file.sha256 is not None and (found := file_sha256(path)) != file.sha256:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise OmniNFTError(
            f"{file.label}: sha256 is {found}, expected {file.sha256}: damaged on the way, or changed since; "
            "it is deleted, fetch again"
        )
    return path


class OfflineError(OmniNFTError):
    """The hub cannot be reached."""


def _model_info(need: Need) -> Any:
    return huggingface_hub.model_info(need.repo, revision=need.revision, timeout=_SECONDS, files_metadata=True)


def _is_here(need: Need, name: str, commit: str) -> bool:
    if need.folder is not None:
        return (need.folder / name).is_file()
    found = huggingface_hub.try_to_load_from_cache(need.repo, name, revision=commit)
    return isinstance(found, str) and Path(found).is_file()


def _from_hub(file: RemoteFile) -> str:
    need = file.need
    path: str = huggingface_hub.hf_hub_download(
        need.repo, file.name, revision=need.revision, local_dir=need.folder and str(need.folder)
    )
    return path


def _from_web(file: RemoteFile) -> Path:
    path = file.need.place / Path(file.name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if file.sha256 is None:  # whether the rest belongs to the same file could not be told
        part.unlink(missing_ok=True)
    with part.open("ab") as opened:
        http_get(file.label, opened, resume_size=opened.tell())
    os.replace(part, path)
    return path


def _translated(what: str, call: Callable[[], Any]) -> Any:
    """What `call` gives; errors of hub and network as one line.

    Raises:
        OmniNFTError: as `fetch`; OfflineError where nothing can be reached.
    """
    try:
        return call()
    except errors.GatedRepoError as error:
        raise OmniNFTError(
            f"{what} is gated: accept its terms at https://huggingface.co/{what} with your account, "
            "run `hf auth login`, and fetch again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OmniNFTError(
            f"the hub has no model {what}, or shows it to its members alone (`hf auth login`); is the name right?"
        ) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise OmniNFTError(f"{what}: {_first_line(error)}") from error
        raise OfflineError(f"{what}: the hub cannot be reached ({_first_line(error)})") from error
    except errors.HfHubHTTPError as error:
        raise OmniNFTError(f"{what}: the server refused ({_first_line(error)})") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise OfflineError(f"{what}: the hub cannot be reached ({_first_line(error)})") from error
    except OSError as error:
        raise OmniNFTError(f"{what}: cannot be written ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    with suppress(IndexError):
        return lines[0]
    return type(error).__name__
