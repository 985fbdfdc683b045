"""Exact, atomic checkpoints in a run folder.

A checkpoint is a folder `checkpoints/step-000040` that holds one safetensors file per group of tensors, `state.json`
and `manifest.json` (size and SHA-256 of every file, the fingerprint of the config, versions). It is written under a
temporary name, flushed to the disk and renamed, so a folder with a final name is whole unless the disk damaged it
later, and that shows in the checksums. One process at a time may write to a run folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from omninft.files import read_json, read_text
from omninft.naming import is_safe_name
from omninft.types import OmniNFTError

FORMAT_VERSION = 1
_STEP_NAME = re.compile(r"step-(\d{6,})")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
# File system overhead, state and manifest, beside the tensors themselves.
_MARGIN_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What `CheckpointStore.save` was given, bit for bit; tensors are on the CPU, in any order within a group."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    step: int


class CheckpointStore:
    """The checkpoints of one run; keeps the newest `keep_last` of them.

    `warnings` lists what the last `save` or `latest` call met that a person should know: checkpoints that are not
    whole, old ones that could not be deleted, later ones that `latest` will prefer.
    """

    def __init__(self, run_dir: str | Path, keep_last: int) -> None:
        if keep_last < 1:
            raise OmniNFTError(f"keep_last is {keep_last}, expected at least 1")
        self.folder = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last
        self.warnings: list[str] = []

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        fingerprint: Mapping[str, object],
    ) -> Path:
        """Write the checkpoint of `step` (from 0) and return its folder.

        `tensors` maps a group's name, which becomes a file's name, to named tensors of any device and dtype. `state`
        holds JSON values (dict with str keys, list, str, int, float, bool, None); floats come back bit for bit, NaN
        and infinities too. `fingerprint` holds the parts of the config that must agree on resume, compared as text.
        A checkpoint of the same step is replaced. Leftovers of killed processes are removed.

        Raises OmniNFTError: a value that would not come back as it was, or a write that failed, with the path and the
        bytes needed and free. The checkpoints that were there before are then intact.
        """
        self.warnings = []
        if step < 0:
            raise OmniNFTError(f"step is {step}, expected 0 or more")
        for group in tensors:
            if not _GROUP_NAME.fullmatch(group):
                raise OmniNFTError(f"tensor group {group!r} cannot name a file, expected letters, digits, _ . -")
        state_text = _exact_json(dict(state))
        needed = _MARGIN_BYTES + len(state_text) + sum(t.nbytes for group in tensors.values() for t in group.values())
        final = self.folder / f"step-{step:06d}"
        self.clean()
        ensure_writable(self.folder, needed)
        temporary = self.folder / f"{_TEMPORARY}{final.name}-{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            (temporary / "state.json").write_text(state_text, encoding="utf-8")
            for group, named in tensors.items():
                file = temporary / f"{group}.safetensors"
                save_file(_separate(named), file)
                # safetensors makes files that only their owner can read; a run folder follows the umask.
                shutil.copymode(temporary / "state.json", file)
            _write_manifest(temporary, step, fingerprint)
            for file in temporary.iterdir():
                _flush(file)
            _flush(temporary)
            self._put_in_place(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OmniNFTError(_write_failure(final, needed, error)) from error
        self._prune(final)
        return final

    def list_checkpoints(self) -> list[Path]:
        """Folders (or files) with the name of a checkpoint, whole or not, in the order of their steps."""
        if not self.folder.is_dir():
            return []
        found = [(int(m[1]), path) for path in self.folder.iterdir() if (m := _STEP_NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Reads every byte of it.

        A checkpoint that is not whole is skipped and told in `warnings`. One of another format version is not skipped,
        so that `load` can say so and newer work is not passed over.
        """
        self.warnings = []
        self._put_back_replaced()
        for path in reversed(self.list_checkpoints()):
            try:
                _verify(path, contents=True)
            except _OtherVersion:
                return path
            except OmniNFTError as error:
                self.warnings.append(f"skipped a checkpoint that is not whole: {error}")
            else:
                return path
        return None

    def load(self, path: str | Path, fingerprint: Mapping[str, object] | None) -> Checkpoint:
        """Verify and read the checkpoint at `path`; `fingerprint` None reads that of any config.

        Raises OmniNFTError naming the file: missing, truncated or changed files, another format version, or a
        fingerprint that differs, with the fields and both values.
        """
        path = Path(path)
        manifest = _verify(path, contents=True)
        if fingerprint is not None:
            _require_same_config(path, manifest["fingerprint"], fingerprint)
        try:
            tensors = {
                name.removesuffix(".safetensors"): load_file(path / name)
                for name in manifest["files"]
                if name.endswith(".safetensors")
            }
            state = _from_exact_json(read_text(path / "state.json"))
            if not isinstance(state, dict):
                raise ValueError(f"state.json holds {state!r:.60}, expected an object")
        except (OSError, SafetensorError, ValueError, TypeError, struct.error, RecursionError) as error:
            raise OmniNFTError(f"{path}: cannot be read ({error})") from error
        return Checkpoint(tensors, state, manifest["step"])

    def clean(self) -> None:
        """Remove what killed processes left under temporary names; no other process may be writing."""
        self._put_back_replaced()
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_TEMPORARY, _REPLACED)):
                    self._delete(path)

    def _put_back_replaced(self) -> None:
        """Undo a replacement that was cut between its two renames."""
        for path in self.folder.glob(f"{_REPLACED}step-*"):
            final = self.folder / path.name.removeprefix(_REPLACED)
            if not final.exists():
                try:
                    os.replace(path, final)
                except OSError as error:
                    self.warnings.append(f"{path}: could not be renamed to {final.name} ({error})")

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        replaced = self.folder / f"{_REPLACED}{final.name}"
        if final.exists():
            # A folder cannot be renamed onto a full one. Until the second rename the old one is found under this name.
            os.replace(final, replaced)
        try:
            os.replace(temporary, final)
        except OSError:
            if replaced.exists():
                os.replace(replaced, final)
            raise
        _flush(self.folder)
        _flush(self.folder.parent)
        if replaced.exists():
            self._delete(replaced)

    def _prune(self, saved: Path) -> None:
        """Delete what is older than the newest `keep_last` checkpoints, never the one just saved."""
        saved_step = _step_of(saved)
        later = [path for path in self.list_checkpoints() if _step_of(path) > saved_step]
        if later:
            # Not deleted: they may be the only copy of a finished run that this one was started back from.
            names = ", ".join(path.name for path in later)
            self.warnings.append(
                f"{self.folder} has later checkpoints than {saved.name}, which resume prefers: {names}"
            )
        older = [path for path in self.list_checkpoints() if _step_of(path) < saved_step]
        # Sizes only: reading every old checkpoint at each save would take as long as writing it.
        whole = [path for path in older if _is_whole(path)]
        kept = whole[max(0, len(whole) - (self.keep_last - 1)) :]
        oldest_kept = _step_of(kept[0]) if kept else saved_step
        for path in older:
            if _step_of(path) < oldest_kept:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        try:
            # Renamed first: a deletion cut short must not leave half a checkpoint under a final name.
            doomed = self.folder / f"{_TEMPORARY}delete-{secrets.token_hex(4)}"
            os.replace(path, doomed)
            if doomed.is_dir():
                shutil.rmtree(doomed)
            else:
                doomed.unlink()
        except OSError as error:
            # The checkpoint just saved is whole: a folder too many is no reason to stop a run.
            self.warnings.append(f"{path}: could not be deleted ({error})")


def ensure_writable(path: str | Path, needed_bytes: int) -> None:
    """Make the folder `path` if it is missing, and check that `needed_bytes` can be written there.

    Raises OmniNFTError with the path: cannot be made or written to, or less free than needed.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Written and not asked for: permission bits say nothing to root and on read-only mounts.
        probe = path / f"{_TEMPORARY}probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"omninft")
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise OmniNFTError(f"{path}: cannot be written to ({error})") from error
    if free < needed_bytes:
        raise OmniNFTError(f"{path}: {_size(needed_bytes)} needed, {_size(free)} free")


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state of an optimiser as (named tensors, JSON values), for `CheckpointStore.save`.

    The tensors are the optimiser's own and not copies: save them before its next step.
    """
    stored = optimizer.state_dict()
    entries = {f"state.{i}.{key}": v for i, named in stored["state"].items() for key, v in _unnested(named).items()}
    for number, group in enumerate(stored["param_groups"]):
        entries |= {f"group.{number}.{key}": value for key, value in group.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    # Tuples (Adam's betas) are lists in JSON; restore_optimizer turns them back.
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in entries.items() if k not in tensors}
    return tensors, {"optimizer": type(optimizer).__name__, "values": values}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Give a fresh optimiser over the same parameters what `flatten_optimizer` returned, bit for bit.

    For optimisers whose state per parameter is scalars and tensors of its shape (Adam, AdamW, SGD and the like), or
    mappings of what has its own (bitsandbytes' 8-bit moments).

    Raises OmniNFTError: another class, other parameter groups, names or shapes.
    """
    if values["optimizer"] != type(optimizer).__name__:
        raise OmniNFTError(f"the state is of {values['optimizer']}, the optimiser is {type(optimizer).__name__}")
    now = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for path, value in {**values["values"], **tensors}.items():
        kind, number, key = path.split(".", 2)
        (state if kind == "state" else groups).setdefault(int(number), {})[key] = value
    if len(groups) != len(now):
        raise OmniNFTError(f"the state has {len(groups)} parameter groups, the optimiser {len(now)}")
    for number, group in enumerate(now):
        found, expected = (len(g["params"]) for g in (groups[number], group))
        if found != expected:
            raise OmniNFTError(f"parameter group {number}: the state has {found} parameters, the optimiser {expected}")
        # Optimisers made from bare tensors have no names to compare.
        for stored_name, name in zip(groups[number].get("param_names", ()), group.get("param_names", ()), strict=False):
            if stored_name != name:
                raise OmniNFTError(f"parameter group {number}: the state has {stored_name}, the optimiser {name}")
        tuples = {key for key, value in group.items() if isinstance(value, tuple)}
        groups[number] |= {key: tuple(groups[number][key]) for key in tuples & groups[number].keys()}
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, named in state.items():
        for key, value in named.items():
            own_shape = _NESTED in key
            if isinstance(value, Tensor) and value.ndim and not own_shape and value.shape != parameters[index].shape:
                shape = list(parameters[index].shape)
                raise OmniNFTError(f"parameter {index}: {key} has shape {list(value.shape)}, the parameter {shape}")
    # Copies: the optimiser updates its state in place.
    copied = {i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in n.items()} for i, n in state.items()}
    nested = {index: _nested(named) for index, named in copied.items()}
    optimizer.load_state_dict({"state": nested, "param_groups": [groups[n] for n in range(len(now))]})
    for index, named in copied.items():
        restored = optimizer.state[parameters[index]]
        for key, value in named.items():
            # load_state_dict casts to the parameter's dtype, which loses bits of a float32 state of bfloat16 weights.
            if isinstance(value, Tensor) and _NESTED not in key and restored[key].dtype != value.dtype:
                restored[key] = value.to(parameters[index].device)


_NESTED = "/"  # between the keys of a mapping and of what is in it


def _unnested(named: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in named.items():
        flat |= {f"{key}{_NESTED}{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in named.items():
        outer, mark, inner = key.partition(_NESTED)
        if mark:
            tree.setdefault(outer, {})[inner] = value
        else:
            tree[key] = value
    return tree


class _OtherVersion(OmniNFTError):
    """A manifest of a format version that this code does not know."""


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own, as the file format wants them."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.nbytes or storage.data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        separate[name] = copy
    return separate


def _write_manifest(folder: Path, step: int, fingerprint: Mapping[str, object]) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT_VERSION,
        "package_version": _package_version(),
        "step": step,
        "fingerprint": {key: str(value) for key, value in fingerprint.items()},
        "files": files,
    }
    manifest["sha256"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _verify(path: Path, contents: bool) -> dict[str, Any]:
    """The manifest of a checkpoint whose files agree with it: in size, and with `contents` in every byte."""
    if not path.is_dir():
        raise OmniNFTError(f"{path}: no such checkpoint folder")
    file = path / "manifest.json"
    manifest = read_json(file, "truncated or changed: ")
    # Every format version keeps these two fields, so that a damaged manifest is not taken for one of another version.
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_digest(manifest):
        raise OmniNFTError(f"{file}: changed since it was written: its checksum differs")
    if manifest.get("format") != FORMAT_VERSION:
        raise _OtherVersion(
            f"{file}: found format version {manifest.get('format')!r} (written by omninft "
            f"{manifest.get('package_version')}), expected {FORMAT_VERSION}: use the version that wrote it"
        )
    _require_shape(file, manifest)
    for name, expected in manifest["files"].items():
        part = path / name
        try:
            size = part.stat().st_size
            if size != expected["size"]:
                how = "truncated" if size < expected["size"] else "changed"
                raise OmniNFTError(f"{part}: {how}: found {size} bytes, expected {expected['size']}")
            if contents and _sha256(part) != expected["sha256"]:
                raise OmniNFTError(f"{part}: changed since it was written: its checksum differs")
        except OSError as error:
            raise OmniNFTError(f"{part}: cannot be read ({error})") from error
    return manifest


def _require_shape(file: Path, manifest: Mapping[str, Any]) -> None:
    """A checksum keeps from accidents, not from a manifest that someone made up."""
    expected = {"step": int, "fingerprint": dict, "files": dict}
    odd = [name for name, kind in expected.items() if not isinstance(manifest.get(name), kind)]
    files = manifest.get("files")
    for name, entry in (files if isinstance(files, dict) else {}).items():
        # Files of the folder itself: a path could lead anywhere.
        if not is_safe_name(name) or not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            odd.append(f"files: {name!r:.100}")
    if odd or "state.json" not in manifest["files"]:
        raise OmniNFTError(f"{file}: not a manifest of a checkpoint ({', '.join(odd) or 'no state.json'})")


def _is_whole(path: Path) -> bool:
    try:
        _verify(path, contents=False)
    except OmniNFTError:
        return False
    return True


def _require_same_config(path: Path, stored: Mapping[str, str], current: Mapping[str, object]) -> None:
    now = {key: str(value) for key, value in current.items()}
    differing = [
        f"{key} (checkpoint: {stored.get(key, 'absent')}, now: {now.get(key, 'absent')})"
        for key in sorted({*stored, *now})
        if stored.get(key) != now.get(key)
    ]
    if differing:
        raise OmniNFTError(f"{path}: made with another config; different fields: {'; '.join(differing)}")


def _write_failure(final: Path, needed: int, error: Exception) -> str:
    try:
        free = _size(shutil.disk_usage(final.parent).free)
    except OSError:
        free = "an unknown amount"
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    reason = "the disk is full" if full else "cannot be written"
    return f"{final}: {reason} ({error}): {_size(needed)} needed, {free} free; earlier checkpoints are intact"


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB ({num_bytes} bytes)"


def _package_version() -> str:
    try:
        return metadata.version("omninft")
    except metadata.PackageNotFoundError:
        return "unknown"


_FLOAT_KEY = "__float__"


def _exact_json(state: dict[str, Any]) -> str:
    """JSON text that reads back as an equal value; refuses values that JSON would change silently."""
    return json.dumps(_encoded(state, "state"), indent=1, allow_nan=False) + "\n"


def _from_exact_json(text: str) -> Any:
    def decoded(value: dict[str, Any]) -> Any:
        return struct.unpack(">d", bytes.fromhex(value[_FLOAT_KEY]))[0] if _FLOAT_KEY in value else value

    return json.loads(text, object_hook=decoded)


def _encoded(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        # Decimal text in Python is exact for finite floats; standard JSON has no others.
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: struct.pack(">d", value).hex()}
    if type(value) is list:
        return [_encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value) is dict:
        for key in value:
            if type(key) is not str or key == _FLOAT_KEY:
                raise OmniNFTError(f"{where}: key {key!r} would not come back as it is; expected another str")
        return {key: _encoded(item, f"{where}.{key}") for key, item in value.items()}
    raise OmniNFTError(
        f"{where} is a {type(value).__name__}, which JSON would not give back; "
        "expected dict, list, str, int, float, bool or None"
    )
