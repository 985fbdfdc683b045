"""The prompts of an evaluation: which were asked for, and those that a folder of clips tells of itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from omninft.clips.listing import LISTING, read_listing
from omninft.prompts.prompt_file import PromptRow
from omninft.types import OmniNFTError


def rows_digest(rows: Sequence[PromptRow]) -> str:
    """16 hexadecimal digits of the texts asked for, in which order; neither of ids nor of where clips lie."""
    tree = [[p.prompt_v, p.prompt_a, p.prompt_av] for p in (row.prompt for row in rows)]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def rows_beside(folder: Path) -> tuple[PromptRow, ...]:
    """The clips that a scores.json in the folder lists with their prompts, as `omninft sample` writes it.

    `sample_0012.mp4` is row 12; clips of other names are numbered as they are listed.

    Raises:
        OmniNFTError: there is none, or it is not such a file.
    """
    if not (folder / LISTING).is_file():
        raise OmniNFTError(
            f"{folder} does not say what its clips were asked for: it has no {LISTING}; give a prompt file (--prompts)"
        )
    rows = []
    for number, listed in enumerate(read_listing(folder)):
        file = folder / listed.file
        named = re.fullmatch(r"sample_(\d+)", file.stem)
        rows.append(PromptRow(int(named[1]) if named else number, listed.prompt, video_path=file, repeat=listed.sample))
    return tuple(rows)
