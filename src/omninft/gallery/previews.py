"""The clips of a user's own prompts over a run: a row for each clip, a column for each look at it."""

from __future__ import annotations

import re

from omninft.gallery.players import PlayerGroup, player_groups
from omninft.gallery.run_folder import ClipSet, RunFolder
from omninft.prompts.sampler import spread

MOST_COLUMNS = 5


def preview_sets(run: RunFolder) -> list[tuple[str, ClipSet]]:
    """The previews with labels, in the order of iterations: all of them, or some evenly spaced, first and last too."""
    found = {int(m[1]): s for name, s in run.clip_sets.items() if (m := re.fullmatch(r"preview-(\d+)", name))}
    iterations = sorted(found)
    *before, last = iterations or [0]
    shown = [before[i] for i in spread(MOST_COLUMNS - 1, len(before))] + ([last] if iterations else [])
    return [("Base" if at == 0 else f"After {at} iterations", found[at]) for at in shown]


def preview_groups(run: RunFolder) -> list[PlayerGroup]:
    """What the template `previews.html.j2` shows; none when the run made no previews."""
    return player_groups(preview_sets(run), run.path, {})
