"""Training the video autoencoder, the audio autoencoder and the vocoder on the bounce world."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from torch import Tensor, nn

from omninft.pretrain import sizes
from omninft.pretrain.mel import log_mel
from omninft.worlds import bounce
from omninft.worlds.dataset import WorldBatch

Report = Callable[[int, dict[str, float]], None]


def to_pixels(video: Any) -> Tensor:
    """uint8 frames [B, T, H, W, 3] as the autoencoder reads them, [B, 3, T, H, W] float32 in -1..1."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def fit(
    modules: list[nn.Module],
    loss_of: Callable[[Tensor], dict[str, Tensor]],
    num_clips: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> None:
    """AdamW with a short warm-up and a cosine to zero; `loss_of(indices)` returns named terms that are added up."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, betas=(0.9, 0.99))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for step in range(steps):
        terms = loss_of(torch.randint(num_clips, (batch,), generator=generator))
        loss = torch.stack(list(terms.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            report(step + 1, {name: value.item() for name, value in terms.items()})


def train_video_vae(data: WorldBatch, steps: int, seed: int, report: Report) -> AutoencoderKLLTX2Video:
    """Autoencoder of the pictures, on mean plus small noise: a sampled posterior collapses at this size."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTX2Video(**sizes.VIDEO_VAE)
    backdrop = torch.as_tensor(bounce.backdrop()).permute(2, 0, 1)[None, :, None].float() * 2 - 1

    def loss_of(index: Tensor) -> dict[str, Tensor]:
        pixels = to_pixels(data.video[index.numpy()])
        mean = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(mean + 0.1 * torch.randn_like(mean)).sample
        # Objects cover few pixels: weigh them up, or the backdrop alone decides the loss.
        weight = 1 + 6 * ((pixels - backdrop).abs().amax(1, keepdim=True) > 0.1)
        error = decoded - pixels
        return {
            "l1": (weight * error.abs()).mean(),
            "l2": (weight * error.square()).mean(),
            "prior": 1e-4 * mean.square().mean(),
        }

    fit([vae], loss_of, len(data.video), steps, 8, 2e-3, seed, report)
    latents = encode_video(vae, data.video[:1024])
    vae.latents_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std(dim=(0, 2, 3, 4)))
    return vae.eval()


def train_audio_vae(data: WorldBatch, steps: int, seed: int, report: Report) -> AutoencoderKLLTX2Audio:
    """Autoencoder of the spectrograms."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTX2Audio(**sizes.AUDIO_VAE)
    waveforms = torch.as_tensor(data.waveforms)

    def loss_of(index: Tensor) -> dict[str, Tensor]:
        mel = log_mel(waveforms[index])[:, None]
        mean = vae.encode(mel).latent_dist.mean
        decoded = vae.decode(mean + 0.1 * torch.randn_like(mean)).sample
        error = decoded - mel[:, :, : decoded.shape[2]]
        return {"l1": error.abs().mean(), "l2": error.square().mean(), "prior": 1e-4 * mean.square().mean()}

    fit([vae], loss_of, len(waveforms), steps, 16, 2e-3, seed, report)
    # Statistics act on packed latents: one value per (channel, mel bin) pair.
    packed = encode_audio(vae, waveforms[:1024])
    vae.latents_mean.copy_(packed.mean(dim=(0, 1)))
    vae.latents_std.copy_(packed.std(dim=(0, 1)))
    return vae.eval()


def train_vocoder(data: WorldBatch, steps: int, seed: int, report: Report) -> LTX2Vocoder:
    """Spectrogram to waveform, in the waveform and in three short-time spectra."""
    torch.manual_seed(seed)
    vocoder = LTX2Vocoder(**sizes.VOCODER)
    waveforms = torch.as_tensor(data.waveforms)
    windows = {n: torch.hann_window(n) for n in (128, 512, 1024)}
    crop, margin = 48, 6  # frames of 10 ms

    def loss_of(index: Tensor) -> dict[str, Tensor]:
        sound = waveforms[index]
        # Slight spectrogram noise: the vocoder will read what the autoencoder decodes, not the truth.
        mel = log_mel(sound)
        mel = mel + 0.02 * torch.randn_like(mel)
        # Crops start shortly before a sound, or most of what is learnt is silence.
        starts = []
        for i in index.tolist():
            times = data.scenes[i].sound_times
            first = int(times[int(torch.randint(len(times), ()))] * 100) - int(torch.randint(4, 34, ()))
            starts.append(min(max(first, 0), mel.shape[1] - crop))
        mel = torch.stack([m[s : s + crop] for m, s in zip(mel, starts, strict=True)])
        target = torch.stack([w[s * sizes.HOP : (s + crop) * sizes.HOP] for w, s in zip(sound, starts, strict=True)])
        inner = slice(margin * sizes.HOP, -margin * sizes.HOP)
        made, target = vocoder(mel[:, None])[:, 0, inner], target[:, inner]
        terms = {"l1": 10 * (made - target).abs().mean(), "l2": 20 * (made - target).square().mean()}
        for n, window in windows.items():
            a = torch.stft(made, n, n // 4, window=window, return_complex=True).abs()
            b = torch.stft(target, n, n // 4, window=window, return_complex=True).abs()
            terms[f"stft{n}"] = (a - b).abs().mean() * 128 / n
        return terms

    fit([vocoder], loss_of, len(waveforms), steps, 16, 4e-3, seed, report)
    return vocoder.eval()


@torch.no_grad()
def encode_video(vae: AutoencoderKLLTX2Video, video: Any, batch: int = 64) -> Tensor:
    """Modes of the posterior, [B, C, f, h, w], not yet normalised."""
    return torch.cat(
        [vae.encode(to_pixels(video[i : i + batch])).latent_dist.mode() for i in range(0, len(video), batch)]
    )


@torch.no_grad()
def encode_audio(vae: AutoencoderKLLTX2Audio, waveforms: Any, batch: int = 64) -> Tensor:
    """Modes of the posterior packed as [B, Ta, Ca], not yet normalised."""
    parts = []
    for i in range(0, len(waveforms), batch):
        mel = log_mel(torch.as_tensor(waveforms[i : i + batch]))[:, None]
        parts.append(vae.encode(mel).latent_dist.mode().transpose(1, 2).flatten(2))
    return torch.cat(parts)
