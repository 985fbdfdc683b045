"""Which video tokens the sound attends to: column sums of the V2A attention, collected while the model runs.

Queries and keys are taken where the attention module itself has normalised them, so nothing is projected twice, and
only sums over the audio queries are kept; no [heads, Ta, Tv] map leaves a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor, nn

from omninft.types import OmniNFTError

# (query [B, H, Ta, d], key [B, H, Tv, d], value [B, H, Tv, dv] or None) -> sums over the queries [B, Tv]
ColumnSums = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class V2ARecorder:
    """Sums the V2A attention of chosen blocks while `recording`; inert otherwise.

    Source: OmniNFT (arXiv:2605.12480), region-wise loss reweighting. The reference code leaves the rotary positions
    out of the map; `rope=False` does the same.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        column_sums: ColumnSums,
        first_block: int = 0,
        rope: bool = True,
        value_weighted: bool = False,
    ) -> None:
        if not 0 <= first_block < len(blocks):
            raise OmniNFTError(f"attention is recorded from block {first_block} on, but the model has {len(blocks)}")
        self.recording = False
        self.per_block: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}
        self._column_sums = column_sums
        self._rope, self._value_weighted = rope, value_weighted
        self._handles: list[Any] = []
        for number, block in enumerate(blocks):
            if number >= first_block:
                self._attach(number, block.video_to_audio_attn)

    def _attach(self, number: int, attention: LTX2Attention) -> None:
        seen: dict[str, Any] = {}

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.recording:
                seen["query_rope"] = kwargs.get("query_rotary_emb")
                seen["key_rope"] = kwargs.get("key_rotary_emb")

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                if self.recording:
                    seen[name] = output.detach()

            return hook

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.recording:
                self._add(number, attention, seen)
                seen.clear()

        self._handles += [
            attention.register_forward_pre_hook(before, with_kwargs=True),
            attention.norm_q.register_forward_hook(keep("query")),
            attention.norm_k.register_forward_hook(keep("key")),
            attention.to_v.register_forward_hook(keep("value")),
            attention.register_forward_hook(after),
        ]

    def _add(self, number: int, attention: LTX2Attention, seen: dict[str, Any]) -> None:
        query, key = seen["query"], seen["key"]
        if self._rope and seen["query_rope"] is not None:
            rotate = apply_split_rotary_emb if attention.rope_type == "split" else apply_interleaved_rotary_emb
            query = rotate(query, seen["query_rope"])
            key = rotate(key, seen["key_rope"] if seen["key_rope"] is not None else seen["query_rope"])
        heads = [t.unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in (query, key, seen["value"])]
        sums = self._column_sums(heads[0], heads[1], heads[2] if self._value_weighted else None)
        previous = self.per_block.get(number)
        self.per_block[number] = sums if previous is None else previous + sums
        self._count[number] = self._count.get(number, 0) + 1

    def take(self) -> dict[int, Tensor]:
        """Mean over the recorded steps per block, [B, Tv] each; starts anew."""
        means = {b: s / self._count[b] for b, s in self.per_block.items()}
        self.per_block, self._count = {}, {}
        return means

    def take_mean(self) -> Tensor:
        """Mean over recorded steps and blocks, [B, Tv] float32; starts anew.

        Raises:
            OmniNFTError: nothing was recorded, so a region weight would be made of nothing.
        """
        means = self.take()
        if not means:
            raise OmniNFTError("V2A attention was asked for, but no block recorded any; are the hooks bound?")
        return torch.stack(list(means.values())).mean(0)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
