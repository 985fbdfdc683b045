"""What the streams read of each other while the model runs: column sums of the V2A attention, and response norms.

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

from omninft.models.protocol import CrossSite
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
        column_sums: ColumnSums | None = None,
        first_block: int = 0,
        rope: bool = True,
        value_weighted: bool = False,
    ) -> None:
        if not 0 <= first_block < len(blocks):
            raise OmniNFTError(f"attention is recorded from block {first_block} on, but the model has {len(blocks)}")
        self.recording = False
        self.per_block: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}
        self._column_sums = column_sums or _column_sums
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

    def collect(self) -> dict[str, Tensor]:
        """`take_mean`, by name."""
        return {"v2a_columns": self.take_mean()}

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class ResponseRecorder:
    """Norms of what A2V writes into the video tokens and V2A into the audio tokens, before their gates.

    Source: Adaptive Reward Routing, which reads token weights and layer scales off them.
    """

    def __init__(self, sites: Sequence[CrossSite]) -> None:
        self.recording = False
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._count: dict[tuple[str, int], int] = {}
        self._handles = [self._attach(site) for site in sites]

    def _attach(self, site: CrossSite) -> Any:
        key = (site.direction, site.block)

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.recording:
                norms = output.detach().float().norm(dim=-1)
                self._sums[key] = self._sums[key] + norms if key in self._sums else norms
                self._count[key] = self._count.get(key, 0) + 1

        return site.find(site.attention).register_forward_hook(after)

    def collect(self) -> dict[str, Tensor]:
        """`a2v_responses` [B, blocks, Tv] and `v2a_responses` [B, blocks, Ta], mean over the recorded steps; anew.

        Raises:
            OmniNFTError: nothing was recorded.
        """
        if not self._sums:
            raise OmniNFTError("cross-modal responses were asked for, but no block recorded any; are the hooks bound?")
        found = {}
        for direction in ("a2v", "v2a"):
            keys = sorted(k for k in self._sums if k[0] == direction)
            found[f"{direction}_responses"] = torch.stack([self._sums[k] / self._count[k] for k in keys], dim=1)
        self._sums, self._count = {}, {}
        return found

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _column_sums(query: Tensor, key: Tensor, value: Tensor | None) -> Tensor:
    return attention_column_sums(query, key, value=value)


@torch.no_grad()
def attention_column_sums(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    chunk: int | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """How much attention every key receives: the head mean of softmax(Q K^T / sqrt(d)), summed over the queries.

    One head and `chunk` queries at a time, so that no [H, Ta, Tv] map is ever held (OmniNFT's section on region
    weights needs the sums alone). No gradient flows.

    Args:
        query: [B, H, Ta, d], after normalisation and rotary positions.
        key: [B, H, Tv, d].
        mask: as scaled_dot_product_attention takes it: bool (True takes part) or added to the logits; [B, Tv] over
            the keys or broadcastable to [B, H, Ta, Tv]. A query that may attend to nothing adds nothing.
        chunk: queries at a time, all of them by default.
        value: [B, H, Tv, dv]; if given, a key's share counts by the norm of its value vector (what it contributes,
            not only how often it is looked at).

    Returns:
        [B, Tv] float32 whatever the input dtype. Without `value` each row adds up to Ta.

    Raises:
        ValueError: shapes that do not fit, or a chunk below 1.
    """
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    if key.shape != (batch, heads, num_keys, width) or (value is not None and value.shape[:3] != key.shape[:3]):
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} (and value) do not fit")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, found {chunk}")
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask
        mask = mask.expand(batch, heads, num_queries, num_keys)
    total = torch.zeros(batch, num_keys, dtype=torch.float32, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for h in range(heads):
            # Sums of one head first: value norms differ between heads.
            sums = torch.zeros_like(total)
            for start in range(0, num_queries, chunk or num_queries):
                rows = slice(start, start + (chunk or num_queries))
                logits = query[:, h, rows].float() @ key[:, h].float().transpose(1, 2) * width**-0.5
                sums += _attention(logits, None if mask is None else mask[:, h, rows]).sum(dim=1)
            total += sums if value is None else sums * value[:, h].float().norm(dim=-1)
    return total / heads


def _attention(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys [B, queries, Tv]; zeros for a query that the mask leaves without a key."""
    if mask is None:
        return logits.softmax(dim=-1)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    return logits.softmax(dim=-1).masked_fill(logits.isneginf().all(dim=-1, keepdim=True), 0.0)
