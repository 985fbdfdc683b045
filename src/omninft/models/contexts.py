"""Text contexts on disk, so that a run whose prompts are known needs no text encoder.

A context is found by what made it: the prompt, its length, and the encoder with its connectors. These are known by
their files (name, size, time; in the hub's cache, where links lead to names that are content hashes, by these), so
that a change of any makes new contexts, and another copy at worst computes them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omninft.files import replacing
from omninft.types import OmniNFTError, TextContext


class ContextCache:
    """A folder of contexts that `identity` made.

    Args:
        folder: made when the first context is written.
        identity: anything that tells encoders apart, as JSON takes it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.dumps(identity, sort_keys=True)

    def file(self, prompt: str) -> Path:
        """Where the context of a prompt is or would be."""
        name = hashlib.sha256(json.dumps([self._identity, prompt]).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def read(self, prompt: str) -> TextContext | None:
        """The context on the CPU, or None.

        Raises:
            OmniNFTError: a file that is damaged.
        """
        file = self.file(prompt)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                return TextContext(*(handle.get_tensor(name) for name in ("video", "audio", "mask")))
        except (OSError, SafetensorError) as error:
            raise OmniNFTError(f"{file}: damaged ({error}); remove it, and its prompt is encoded again") from error

    def write(self, prompt: str, context: TextContext) -> None:
        """Keep a context; the file appears when it is whole.

        Raises:
            OmniNFTError: the folder cannot be written to.
        """
        parts = {"video": context.video, "audio": context.audio, "mask": context.mask}
        with replacing(self.file(prompt)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in parts.items()}, temporary)


def identity_of(files: Iterable[Path]) -> list[str]:
    """What tells these files from others, without reading them."""
    found = []
    for file in sorted(files):
        real = file.resolve()
        seen = "" if file.is_symlink() else f" {real.stat().st_mtime_ns}"
        found.append(f"{file.name} {real.name} {real.stat().st_size}{seen}")
    return found
