"""Which prompts an iteration trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

from omninft.types import OmniNFTError, Prompt, PromptGroup


class GroupSampler:
    """Prompt groups as a pure function of (seed, iteration): resuming needs no state.

    The prompts go by in epochs, each a permutation keyed by (seed, epoch, prompt id); iteration i takes the places
    i * P to (i + 1) * P of that endless sequence. Every prompt comes once in an epoch, and an iteration that spans two
    epochs holds no prompt twice. The order of the rows in the prompt file does not matter.

    Raises OmniNFTError: fewer prompts than P, sizes below 1, two prompts of the same id.
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_iteration: int, group_size: int, seed: int) -> None:
        if prompts_per_iteration < 1 or group_size < 1:
            raise OmniNFTError(
                f"found prompts_per_iteration {prompts_per_iteration} and group_size {group_size}, expected at least 1"
            )
        if len(prompts) < prompts_per_iteration:
            raise OmniNFTError(
                f"found {len(prompts)} prompts, expected at least prompts_per_iteration = {prompts_per_iteration}: "
                "an iteration holds no prompt twice"
            )
        self.prompts = {prompt.id: prompt for prompt in prompts}
        if len(self.prompts) < len(prompts):
            ids = [prompt.id for prompt in prompts]
            twice = next(i for i in ids if ids.count(i) > 1)
            raise OmniNFTError(f"found two prompts of id {twice!r}, expected distinct ids")
        self.prompts_per_iteration = prompts_per_iteration
        self.group_size = group_size
        self.seed = seed
        # Iterations in a row read the same epoch; the cache only saves time.
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)
        self._order = lru_cache(maxsize=4)(self._compute_order)

    def groups(self, iteration: int) -> list[PromptGroup]:
        """The P groups of `iteration` (from 0), each with samples 0 to G - 1."""
        if iteration < 0:
            raise OmniNFTError(f"found iteration {iteration}, expected 0 or more")
        samples = tuple(range(self.group_size))
        chosen: list[str] = []
        place = iteration * self.prompts_per_iteration
        while len(chosen) < self.prompts_per_iteration:
            epoch, offset = divmod(place, len(self.prompts))
            part = self._order(epoch)[offset : offset + self.prompts_per_iteration - len(chosen)]
            chosen += part
            place += len(part)
        return [PromptGroup(self.prompts[prompt_id], samples) for prompt_id in chosen]

    def _shuffle(self, epoch: int) -> tuple[str, ...]:
        # Sorting by hash, unlike a library's generator, gives the same order in every version and for any row order.
        def key(prompt_id: str) -> bytes:
            return hashlib.sha256(json.dumps([self.seed, epoch, prompt_id]).encode("ascii")).digest()

        return tuple(sorted(self.prompts, key=key))

    def _compute_order(self, epoch: int) -> tuple[str, ...]:
        """The shuffled epoch, its head repaired so as not to repeat the tail of the epoch before in one iteration.

        The repair moves nothing beyond place P, so with 2P - 1 prompts or more it never reaches the tail (at most P - 1
        places) and tails are read off the shuffles. With fewer, each repair depends on the one before; the chain
        begins where an epoch begins with an iteration, less than P epochs back.
        """
        total, per_iteration = len(self.prompts), self.prompts_per_iteration
        if total >= 2 * per_iteration - 1:
            first = max(0, epoch - 1)
        else:
            first = epoch
            while first * total % per_iteration:
                first -= 1
        order = self._shuffled(first)
        for current in range(first + 1, epoch + 1):
            tail_length = current * total % per_iteration
            tail = set(order[total - tail_length :]) if tail_length else set()
            shuffled = self._shuffled(current)
            head = [i for i in shuffled if i not in tail][: per_iteration - tail_length if tail_length else 0]
            taken = set(head)
            order = (*head, *(i for i in shuffled if i not in taken))
        return order


def evaluation_groups(prompts: Sequence[Prompt], num_clips: int) -> list[PromptGroup]:
    """`num_clips` clips spread over the prompts: evenly spaced prompts first, then more samples of each."""
    chosen = min(num_clips, len(prompts))
    picked = [prompts[i] for i in spread(chosen, len(prompts))]
    base, extra = divmod(num_clips, chosen)
    return [PromptGroup(p, tuple(range(base + (i < extra)))) for i, p in enumerate(picked)]


def spread(count: int, among: int) -> list[int]:
    """`count` evenly spaced positions out of `among`."""
    count = min(count, among)
    return [i * among // count for i in range(count)] if count else []
