"""Flow-matching pretraining of the transformer and its text connectors on encoded clips."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import Tensor

from omninft.pretrain import sizes
from omninft.worlds import bounce

CAPTION_DROP = 0.1
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Encoded:
    """What the transformer learns from: normalised latents and text states of N clips."""

    video: Tensor  # [N, Tv, C]
    audio: Tensor  # [N, Ta, Ca]
    text: Tensor  # [M, L, width * layers], distinct captions; row 0 is the empty caption
    text_mask: Tensor  # [M, L]
    caption: Tensor  # [N] int64, row of `text`


class FlowTraining:
    """Transformer, connectors, their moving average and optimiser; every step's draws are keyed by its number."""

    def __init__(self, size: sizes.Size, seed: int, learning_rate: float = 1.5e-3) -> None:
        torch.manual_seed(seed)
        self.size, self.seed, self.step = size, seed, 0
        self.transformer = LTX2VideoTransformer3DModel(**size.transformer)
        self.connectors = LTX2TextConnectors(**sizes.CONNECTORS)
        self.modules = torch.nn.ModuleDict({"transformer": self.transformer, "connectors": self.connectors})
        self.average = copy.deepcopy(self.modules).requires_grad_(False)
        decay = [p for p in self.modules.parameters() if p.ndim >= 2]
        plain = [p for p in self.modules.parameters() if p.ndim < 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.98),
        )
        self.learning_rate = learning_rate
        self._coords: tuple[Tensor, Tensor] | None = None

    def coords(self, batch: int, audio_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions of video and audio tokens for a batch."""
        if self._coords is None or self._coords[0].shape[0] != batch:
            frames = (bounce.NUM_FRAMES - 1) // 4 + 1
            side = bounce.HEIGHT // 8
            device = next(self.transformer.parameters()).device
            video = self.transformer.rope.prepare_video_coords(batch, frames, side, side, device, fps=bounce.FRAME_RATE)
            self._coords = video, self.transformer.audio_rope.prepare_audio_coords(batch, audio_tokens, device)
        return self._coords

    def loss(self, data: Encoded, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean squared velocity error of one batch, per modality."""
        device = data.video.device
        batch = self.size.transformer_batch
        index = torch.randint(len(data.video), (batch,), generator=generator)
        video, audio = data.video[index], data.audio[index]
        caption = data.caption[index].masked_fill((torch.rand(batch, generator=generator) < CAPTION_DROP).to(device), 0)
        # Mid noise levels decide layout and timing; a uniform share keeps the ends trained.
        mid = torch.sigmoid(0.2 + 1.2 * torch.randn(batch, generator=generator))
        flat = torch.rand(batch, generator=generator)
        sigma = torch.where(torch.rand(batch, generator=generator) < 0.7, mid, flat).clamp(1e-3, 1.0).to(device)
        noise_v = torch.randn(video.shape, generator=generator).to(device)
        noise_a = torch.randn(audio.shape, generator=generator).to(device)
        s = sigma[:, None, None]
        text_v, text_a, mask = self.connectors(data.text[caption], data.text_mask[caption])
        coords_v, coords_a = self.coords(batch, audio.shape[1])
        made_v, made_a = self.transformer(
            hidden_states=(1 - s) * video + s * noise_v,
            audio_hidden_states=(1 - s) * audio + s * noise_a,
            encoder_hidden_states=text_v,
            audio_encoder_hidden_states=text_a,
            timestep=1000 * sigma,
            sigma=1000 * sigma,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            video_coords=coords_v,
            audio_coords=coords_a,
            use_cross_timestep=True,
            return_dict=False,
        )
        return (made_v - (noise_v - video)).square().mean(), (made_a - (noise_a - audio)).square().mean()

    def train_step(self, data: Encoded) -> dict[str, float]:
        """One optimiser step; learning rate warms up over 3 % of the steps and falls as a cosine to 2 %."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        total, warmup = self.size.transformer_steps, max(1, self.size.transformer_steps // 33)
        rate = min((self.step + 1) / warmup, 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.step / total)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * rate
        loss_v, loss_a = self.loss(data, generator)
        self.optimiser.zero_grad(set_to_none=True)
        (loss_v + loss_a).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"pretraining diverged at step {self.step}: gradient norm {float(norm)}")
        self.optimiser.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            currents: list[Tensor] = list(self.modules.parameters())
            torch._foreach_lerp_(averages, currents, 1 - decay)
        return {"video": float(loss_v.detach()), "audio": float(loss_a.detach()), "gradient_norm": float(norm)}

    def run(self, data: Encoded, report: Callable[[int, dict[str, float]], None], stop: int | None = None) -> None:
        """Train to step `stop` (default: the size's number of steps)."""
        stop = self.size.transformer_steps if stop is None else min(stop, self.size.transformer_steps)
        while self.step < stop:
            report(self.step + 1, self.train_step(data))
