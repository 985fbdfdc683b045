"""Synchformer: by how much picture and sound of a clip are out of step, in 21 classes of 0.2 s.

Iashin et al., "Synchformer: Efficient Synchronization from Sparse Cues" (ICASSP 2024). A MotionFormer with divided
space-time attention reads the frames of a segment, an audio spectrogram transformer its sound, and a small transformer
a block of 14 segments of both. Written from the published layout: parameter names and shapes are those of
synchformer_state_dict.pth, which loads strictly.

Shapes: S segments, B blocks, D width (768); per segment t = 8 video steps of P = 196 patches, and 6 audio steps of 12
frequency bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from omninft.scorers.batching import unique
from omninft.scorers.synchformer_inputs import (
    BLOCK_SEGMENTS,
    MEL_FRAMES,
    NUM_MELS,
    SEGMENT_FRAMES,
    SyncInputs,
    block_segments,
    normalised_pictures,
)
from omninft.scorers.weights import JudgingModel, load_strict

_FILE = "synchformer_state_dict.pth"

SYNCHFORMER = JudgingModel(
    name="Synchformer",
    parameters=237_460_245,
    licence="code MIT; weights not stated for certain",
    commercial=False,
    files=(_FILE,),
    url="https://github.com/hkchengrex/MMAudio/releases/download/v0.1/",
    sha256={_FILE: "8aff082f2df5c3bc52759db0c865c7ee772ae6400b860d1b7e90413f2defb67c"},
)

OFFSETS = np.arange(-10, 11) / 5  # s, of the classes


@dataclass(frozen=True)
class SynchformerConfig:
    """Sizes; the defaults are those of the released model."""

    width: int = 768
    heads: int = 12
    layers: int = 12  # of the video and of the audio network
    fusion_heads: int = 8
    fusion_layers: int = 3
    mlp_ratio: int = 4
    image_size: int = 224  # pixels
    patch: int = 16  # pixels
    tubelet: int = 2  # frames
    audio_patch: int = 16
    audio_stride: int = 10

    @property
    def video_steps(self) -> int:
        return SEGMENT_FRAMES // self.tubelet

    @property
    def patches(self) -> int:
        """Per video step."""
        return (self.image_size // self.patch) ** 2

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Frequency bands and time steps."""
        bands, steps = ((n - self.audio_patch) // self.audio_stride + 1 for n in (NUM_MELS, MEL_FRAMES))
        return bands, steps

    @property
    def fusion_tokens(self) -> int:
        """One for the offset, one between the modalities."""
        return 2 + BLOCK_SEGMENTS * (self.video_steps + self.audio_grid[1])


def _heads_apart(x: Tensor, heads: int) -> Tensor:
    """[B, L, D] to [B, heads, L, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _heads_together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


class _DividedAttention(nn.Module):
    """Attention within groups of tokens; the class token attends to all and is attended to by all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, steps: int, along: Literal["time", "space"]) -> Tensor:
        """[S, 1 + steps * P, D], tokens ordered by step, then patch. A group is one patch over time, or one step."""
        q, k, v = (_heads_apart(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        first = scaled_dot_product_attention(q[:, :, :1], k, v)
        there, back = ((0, 3, 1, 2, 4), (0, 2, 3, 1, 4)) if along == "time" else ((0, 2, 1, 3, 4), (0, 2, 1, 3, 4))

        def grouped(tokens: Tensor) -> Tensor:
            """[S, heads, steps * P, d] to [S, groups, heads, tokens of a group, d]."""
            return tokens.unflatten(2, (steps, -1)).permute(there)

        def with_class(tokens: Tensor) -> Tensor:
            """[S, heads, 1 + steps * P, d] to [S * groups, heads, 1 + tokens of a group, d]."""
            groups = grouped(tokens[:, :, 1:])
            shared = tokens[:, None, :, :1].expand(-1, groups.shape[1], -1, -1, -1)
            return torch.cat([shared, groups], dim=3).flatten(0, 1)

        query = grouped(q[:, :, 1:])
        rest = scaled_dot_product_attention(query.flatten(0, 1), with_class(k), with_class(v))
        rest = rest.unflatten(0, query.shape[:2]).permute(back).flatten(2, 3)
        return self.proj(_heads_together(torch.cat([first, rest], dim=2)))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _VideoBlock(nn.Module):
    """Time attention on norm3, then space attention on norm1, then the MLP on norm2."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = _DividedAttention(config.width, config.heads)
        self.timeattn = _DividedAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = _Mlp(config.width, config.mlp_ratio * config.width)
        self.norm3 = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        x = x + self.timeattn(self.norm3(x), steps, "time")
        x = x + self.attn(self.norm1(x), steps, "space")
        return x + self.mlp(self.norm2(x))


class _Aggregation(nn.TransformerEncoderLayer):
    """One pre-norm encoder layer whose own class token comes to stand for all tokens."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__(
            config.width,
            config.heads,
            config.mlp_ratio * config.width,
            dropout=0.0,
            activation=nn.GELU(),
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))

    def pool(self, tokens: Tensor) -> Tensor:
        """[..., L, D] to [..., D]."""
        flat = tokens.flatten(0, -3)
        flat = torch.cat([self.cls_token.expand(len(flat), -1, -1), flat], dim=1)
        return self(flat)[:, 0].unflatten(0, tokens.shape[:-2])


class _PatchEmbedding(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj


class _VideoNetwork(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, patch, tubelet = config.width, config.patch, config.tubelet
        self.steps = config.video_steps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, config.video_steps, width))
        # The released file holds the patch embedding of still images too; nothing reads it.
        self.patch_embed = _PatchEmbedding(nn.Conv2d(3, width, patch, patch))
        cube = (tubelet, patch, patch)
        self.patch_embed_3d = _PatchEmbedding(nn.Conv3d(3, width, cube, cube))
        self.blocks = nn.ModuleList(_VideoBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.spatial_attn_agg = _Aggregation(config)

    def forward(self, pictures: Tensor) -> Tensor:
        """[S, 3, 16, H, W] in -1 .. 1 to [S, t, D]."""
        x = self.patch_embed_3d.proj(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        position = (self.temp_embed[:, :, None] + patches[:, None]).flatten(1, 2)
        x = x + torch.cat([first, position], dim=1)
        for block in self.blocks:
            x = block(x, self.steps)
        return self.spatial_attn_agg.pool(self.norm(x[:, 1:]).unflatten(1, (self.steps, -1)))


class _AudioEmbedding(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, (bands, steps) = config.width, config.audio_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + bands * steps, width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(1, width, config.audio_patch, config.audio_stride)}
        )

    def forward(self, mel: Tensor) -> Tensor:
        """[S, time, frequency] to [S, 2 + bands * steps, D], all steps of the lowest band first."""
        patches = self.patch_embeddings["projection"](mel.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        own = torch.cat([self.cls_token, self.distillation_token], dim=1).expand(len(mel), -1, -1)
        return torch.cat([own, patches], dim=1) + self.position_embeddings


class _AudioBlock(nn.Module):
    """Pre-norm, under the names of transformers' audio spectrogram transformer."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads = config.heads
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.attention = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width)}),
            }
        )
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed, inner = self.layernorm_before(x), self.attention.get_submodule("attention")
        q, k, v = (_heads_apart(inner.get_submodule(name)(normed), self.heads) for name in ("query", "key", "value"))
        attended = _heads_together(scaled_dot_product_attention(q, k, v))
        x = x + self.attention.get_submodule("output.dense")(attended)
        hidden = functional.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)


class _AudioNetwork(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.grid = config.audio_grid
        self.ast = nn.ModuleDict(
            {
                "embeddings": _AudioEmbedding(config),
                "encoder": nn.ModuleDict(
                    {"layer": nn.Sequential(*(_AudioBlock(config) for _ in range(config.layers)))}
                ),
                "layernorm": nn.LayerNorm(config.width, eps=1e-12),
            }
        )
        self.freq_attn_agg = _Aggregation(config)

    def forward(self, mel: Tensor) -> Tensor:
        """[S, 66, 128] to [S, 6, D]: the frequency bands of each time step pooled."""
        x = self.ast.get_submodule("encoder.layer")(self.ast["embeddings"](mel))
        x = self.ast["layernorm"](x)[:, 2:].unflatten(1, self.grid)
        return self.freq_attn_agg.pool(x.transpose(1, 2))


class _FusionBlock(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads = config.fusion_heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("key", "query", "value", "proj")})
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        q, k, v = (_heads_apart(self.attn[name](normed), self.heads) for name in ("query", "key", "value"))
        x = x + self.attn["proj"](_heads_together(scaled_dot_product_attention(q, k, v)))
        return x + self.mlp(self.ln2(x))


class _Fusion(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width = config.width
        self.OFF_tok = nn.Parameter(torch.zeros(1, 1, width))
        self.MOD_tok = nn.Parameter(torch.zeros(1, 1, width))
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pos_emb_cfg = nn.ParameterDict({"pos_emb": torch.zeros(1, config.fusion_tokens, width)})
        self.blocks = nn.Sequential(*(_FusionBlock(config) for _ in range(config.fusion_layers)))
        self.ln_f = nn.LayerNorm(width)
        self.off_head = nn.Linear(width, len(OFFSETS))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """[B, 14 * t, D] and [B, 14 * 6, D] to logits [B, 21]."""
        offset, between = (token.expand(len(video), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        x = torch.cat([offset, self.vis_in_lnorm(video), between, self.aud_in_lnorm(audio)], dim=1)
        x = self.ln_f(self.blocks(x + self.pos_emb_cfg["pos_emb"]))
        return self.off_head(x[:, 0])


class Synchformer(nn.Module):
    """The whole network; segments are encoded alone, blocks of 14 are judged together."""

    def __init__(self, config: SynchformerConfig | None = None) -> None:
        super().__init__()
        config = config or SynchformerConfig()
        self.vfeat_extractor = _VideoNetwork(config)
        self.afeat_extractor = _AudioNetwork(config)
        self.vproj = nn.Linear(config.width, config.width)
        self.aproj = nn.Linear(config.width, config.width)
        self.transformer = _Fusion(config)

    def encode_video(self, pictures: Tensor) -> Tensor:
        """[S, 16, 3, H, W] in -1 .. 1 to [S, t, D]."""
        return self.vproj(self.vfeat_extractor(pictures.transpose(1, 2)))

    def encode_audio(self, mel: Tensor) -> Tensor:
        """Normalised log mel spectra [S, 66, 128] to [S, 6, D]."""
        return self.aproj(self.afeat_extractor(mel))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """Encoded segments [B, 14, t, D] and [B, 14, 6, D] to logits [B, 21] of OFFSETS."""
        return self.transformer(video.flatten(1, 2), audio.flatten(1, 2))


class DeSyncScorer:
    """Offsets of clips by a Synchformer; segments of all clips share the forward passes."""

    def __init__(self, network: Synchformer) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def offsets(self, clips: Sequence[SyncInputs], budget: int = 14) -> list[np.ndarray]:
        """Per clip the offset of each of its blocks, s in -2 .. 2 [blocks]; NaN where the logits are not finite.

        `budget` is the number of segments (and of blocks) in a forward pass. A segment that several blocks share is
        encoded once, and the black segments past the end of clips once for all.
        """
        places = [(c, s) for c, clip in enumerate(clips) for s in range(clip.num_segments)]
        black = next((place for place in places if clips[place[0]].is_black(place[1])), None)
        shown, index = unique([(black or (c, s)) if clips[c].is_black(s) else (c, s) for c, s in places])
        video = torch.cat([self._encoded_pictures(clips, batch) for batch in _batches(shown, budget)])[index]
        audio = torch.cat([self._encoded_sounds(clips, batch) for batch in _batches(places, budget)])

        blocks = [block_segments(clip.num_segments) for clip in clips]
        starts = np.cumsum([0, *(clip.num_segments for clip in clips[:-1])])
        rows = torch.tensor(
            [[start + s for s in block] for start, own in zip(starts, blocks, strict=True) for block in own]
        )
        logits = torch.cat([self.network(video[r], audio[r]) for r in rows.split(budget)]).float().cpu().numpy()
        offsets = np.where(np.isfinite(logits).all(axis=1), OFFSETS[logits.argmax(axis=1)], np.nan)
        return np.split(offsets, np.cumsum([len(own) for own in blocks])[:-1])

    def desync(self, clips: Sequence[SyncInputs], budget: int = 14) -> np.ndarray:
        """Mean over the blocks of a clip of the absolute offset, s in 0 .. 2 [len(clips)]; lower is better."""
        return np.array([np.abs(offsets).mean() for offsets in self.offsets(clips, budget)])

    def _encoded_pictures(self, clips: Sequence[SyncInputs], places: Sequence[tuple[int, int]]) -> Tensor:
        """[len(places), t, D] of (clip, segment)."""
        parameter = next(self.network.parameters())
        pictures = torch.stack([clips[c].picture(s) for c, s in places]).to(parameter.device)
        return self.network.encode_video(normalised_pictures(pictures).to(parameter.dtype))

    def _encoded_sounds(self, clips: Sequence[SyncInputs], places: Sequence[tuple[int, int]]) -> Tensor:
        """[len(places), 6, D] of (clip, segment)."""
        sounds = torch.stack([clips[c].sound(s) for c, s in places])
        return self.network.encode_audio(sounds.to(next(self.network.parameters())))


def _batches(places: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    return [places[i : i + size] for i in range(0, len(places), size)]


def load_synchformer(
    path: str | Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> DeSyncScorer:
    """The released model from `path` (the file or its folder) or the weights folder.

    Raises:
        OmniNFTError: a missing file (with the command that fetches it), another checksum, other names or shapes.
    """
    state = SYNCHFORMER.state(_FILE, path)
    with torch.device("meta"):
        network = Synchformer()
    network = network.to_empty(device="cpu")  # every value comes from the file
    load_strict(network, state, _FILE)
    return DeSyncScorer(network.to(device, dtype))
