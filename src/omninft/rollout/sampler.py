"""Batched sampling of both streams from keyed noise, with the guidance terms of the LTX-2 pipeline.

Guidance acts on predictions of the clean latents, per stream (video and audio have their own scales):

    x0 + (text - 1)(x0 - x0_uncond) + stg (x0 - x0_stg) + (modality - 1)(x0 - x0_isolated),

then its standard deviation is pulled back to that of x0 by the share `rescale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from omninft.config import GuidanceConfig, SamplingConfig
from omninft.noise import keyed_normal
from omninft.types import Conditioning, Geometry, Latents, OmniNFTError, PromptGroup, Rollout, TextContext

ReadFrame = Callable[[str, int, int], Tensor]


class Recorder(Protocol):
    """Collects attention while `recording` is set."""

    recording: bool

    def take_mean(self) -> Tensor: ...


class RolloutSampler:
    """Samples prompt groups with one adapter of a policy.

    Args:
        policy: see `omninft.models.ltx2.LTX2Policy`.
        sampling: steps, guidance and sizes.
        recorder: records V2A attention during `record_steps`, in conditional passes only; None records nothing.
        read_frame: (path, height, width) -> uint8 [H, W, 3]; needed where prompts give a first frame.
    """

    def __init__(
        self,
        policy: Any,
        sampling: SamplingConfig,
        recorder: Recorder | None = None,
        record_steps: Iterable[int] = (),
        read_frame: ReadFrame | None = None,
    ) -> None:
        policy.check_sampling(sampling)
        self.policy, self.sampling = policy, sampling
        self.geometry: Geometry = policy.geometry(sampling)
        self.sigmas: Tensor = policy.sigmas(sampling.num_steps, self.geometry)  # [steps + 1]
        self.read_frame = read_frame
        self.recorder, self.record_steps = recorder, frozenset(record_steps)

    @torch.no_grad()
    def sample(
        self,
        groups: tuple[PromptGroup, ...],
        seed: int,
        iteration: int,
        adapter: str,
    ) -> Rollout:
        """Clean latents of every clip of `groups`; noise is keyed by (seed, iteration, prompt id, sample)."""
        prompts = [g.prompt for g in groups for _ in g.samples]
        keys = [(g.prompt.id, s) for g in groups for s in g.samples]
        context = self.policy.encode([p.prompt_av for p in prompts])
        given = self._conditioning([p.first_frame_path for p in prompts])
        noise = self.initial_noise(keys, seed, iteration)
        latents = self._integrate(noise, context, adapter, given)
        attention = None
        if self.recorder is not None and self.record_steps:
            attention = self.recorder.take_mean()
        return Rollout(groups, latents, context, given, attention)

    def initial_noise(self, keys: list[tuple[str, int]], seed: int, iteration: int) -> Latents:
        """Standard normal latents of the clips named by `keys`."""
        g = self.geometry
        video = keyed_normal(keys, (g.video_tokens, g.video_channels), seed, iteration, "sample_video")
        audio = keyed_normal(keys, (g.audio_tokens, g.audio_channels), seed, iteration, "sample_audio")
        return Latents(video, audio).to(self.policy.device)

    def _conditioning(self, paths: list[str | None]) -> Conditioning | None:
        if not any(paths):
            return None
        if self.read_frame is None:
            raise OmniNFTError("a prompt gives a first frame, but this sampler was made without a reader for it")
        g = self.geometry
        # Clips without a first frame go along with an empty mask.
        blank = torch.zeros(g.height, g.width, 3, dtype=torch.uint8)
        frames = torch.stack([self.read_frame(p, g.height, g.width) if p else blank for p in paths])
        given = self.policy.encode_first_frame(frames, self.geometry)
        has_frame = torch.tensor([bool(p) for p in paths], device=given.mask.device)
        return Conditioning(given.video, given.mask & has_frame[:, None])

    def _integrate(self, noise: Latents, context: TextContext, adapter: str, given: Conditioning | None) -> Latents:
        """Euler steps from noise to clean latents."""
        video, audio = noise.video, noise.audio
        negative = self._negative_context(len(noise))
        for step, (sigma, after) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            now = Latents(video, audio)
            level = sigma.to(video.device).expand(len(noise))
            clean = self._guided(now, level, context, negative, adapter, given, step)
            # d x / d sigma = v = (x - x0) / sigma
            video = video + (after - sigma) * (video - clean.video) / sigma
            audio = audio + (after - sigma) * (audio - clean.audio) / sigma
        if given is not None:
            video = torch.where(given.mask[..., None], given.video, video)
        return Latents(video, audio)

    def _negative_context(self, batch: int) -> TextContext | None:
        guidance = (self.sampling.video_guidance, self.sampling.audio_guidance)
        if all(g.text == 1.0 for g in guidance):
            return None
        return self.policy.encode([self.sampling.negative_prompt] * batch)

    def _guided(
        self,
        latents: Latents,
        sigma: Tensor,
        context: TextContext,
        negative: TextContext | None,
        adapter: str,
        given: Conditioning | None,
        step: int,
    ) -> Latents:
        """Prediction of the clean latents after guidance."""
        s = sigma[:, None, None]

        def clean(text: TextContext, mode: str = "joint") -> Latents:
            v = self.policy.velocity(
                latents, sigma, text, self.geometry, adapter, given, mode, self.sampling.stg_blocks
            )
            return Latents(latents.video - s * v.video, latents.audio - s * v.audio)

        if self.recorder is not None:
            self.recorder.recording = step in self.record_steps
        plain = clean(context)
        if self.recorder is not None:
            self.recorder.recording = False
        guidance = (self.sampling.video_guidance, self.sampling.audio_guidance)
        weaker: list[tuple[Latents, list[float]]] = []
        if negative is not None:
            weaker.append((clean(negative), [g.text - 1 for g in guidance]))
        if any(g.stg for g in guidance):
            weaker.append((clean(context, "stg"), [g.stg for g in guidance]))
        if any(g.modality != 1.0 for g in guidance):
            weaker.append((clean(context, "isolated"), [g.modality - 1 for g in guidance]))
        if not weaker:
            return plain
        video = guide(plain.video, [(w.video, scale[0]) for w, scale in weaker], guidance[0])
        audio = guide(plain.audio, [(w.audio, scale[1]) for w, scale in weaker], guidance[1])
        return Latents(video, audio)


def guide(clean: Tensor, weaker: list[tuple[Tensor, float]], guidance: GuidanceConfig) -> Tensor:
    """Push x0 [B, T, C] away from weaker predictions, then rescale per clip (Lin et al. 2023, section 3.4)."""
    guided = clean
    for other, scale in weaker:
        guided = guided + scale * (clean - other)
    if guidance.rescale > 0:
        ratio = clean.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True)
        guided = guidance.rescale * guided * ratio + (1 - guidance.rescale) * guided
    return guided


def batches(
    groups: list[PromptGroup], batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[PromptGroup, ...]]:
    """This process's share of the groups' clips, in order, in batches; a group may be cut between batches."""
    clips = [(g.prompt, s) for g in groups for s in g.samples]
    share = len(clips) // world
    mine = clips[rank * share : (rank + 1) * share]
    for start in range(0, len(mine), batch_size):
        parts: list[PromptGroup] = []
        for prompt, sample in mine[start : start + batch_size]:
            if parts and parts[-1].prompt.id == prompt.id:
                parts[-1] = PromptGroup(prompt, (*parts[-1].samples, sample))
            else:
                parts.append(PromptGroup(prompt, (sample,)))
        yield tuple(parts)
