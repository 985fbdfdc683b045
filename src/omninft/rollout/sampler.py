"""Batched sampling of both streams from keyed noise, with the guidance terms of the LTX-2 pipeline.

Guidance acts on predictions of the clean latents, per stream (video and audio have their own scales):

    x0 + (text - 1)(x0 - x0_uncond) + stg (x0 - x0_stg) + (modality - 1)(x0 - x0_isolated),

then its standard deviation is pulled back to that of x0 by the share `rescale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from omninft.config import GuidanceConfig, SamplingConfig
from omninft.models.protocol import AdapterName, JointPolicy, Mode, Recorder
from omninft.noise import Purpose, keyed_normal
from omninft.rollout.solvers import ode_step, sde_step, step_log_prob
from omninft.types import (
    Conditioning,
    Geometry,
    Latents,
    Needs,
    OmniNFTError,
    PromptGroup,
    Rollout,
    TextContext,
    Trajectory,
    regrouped,
)

ReadFrame = Callable[[str, int, int], Tensor]
NOTHING = Needs()


class RolloutSampler:
    """Samples prompt groups with one adapter of a policy.

    Args:
        policy: the model.
        sampling: steps, guidance and sizes.
        needs: what is recorded and kept on the way, and the solver.
        read_frame: (path, height, width) -> uint8 [H, W, 3]; needed where prompts give a first frame.
        recorders: recorders with the steps they record, in place of those that `needs` asks for.

    Raises:
        OmniNFTError: guidance that the model cannot do, or a stochastic solver without noise.
    """

    def __init__(
        self,
        policy: JointPolicy,
        sampling: SamplingConfig,
        needs: Needs = NOTHING,
        read_frame: ReadFrame | None = None,
        recorders: Sequence[tuple[Recorder, Iterable[int]]] | None = None,
    ) -> None:
        policy.check_sampling(sampling)
        if needs.solver == "sde" and needs.noise_level <= 0:
            raise OmniNFTError(f"solver sde needs a noise_level above 0, found {needs.noise_level}")
        self.policy, self.sampling, self.needs = policy, sampling, needs
        self.geometry: Geometry = policy.geometry(sampling)
        self.sigmas: Tensor = (  # [steps + 1]
            policy.sigmas(sampling.num_steps, self.geometry, sampling.shift_tokens)
            if sampling.sigmas is None
            else torch.tensor([*sampling.sigmas, 0.0])
        )
        self.read_frame = read_frame
        if recorders is None:
            recorders = [
                (policy.recorder(wanted), collection_steps(sampling.num_steps, wanted.window))
                for wanted in needs.recordings
            ]
        self.recorders = [(recorder, frozenset(steps)) for recorder, steps in recorders]

    @torch.no_grad()
    def sample(
        self,
        groups: tuple[PromptGroup, ...],
        seed: int,
        iteration: int,
        adapter: AdapterName,
    ) -> Rollout:
        """Clean latents of every clip of `groups`; noise is keyed by (seed, iteration, prompt id, sample)."""
        prompts = [g.prompt for g in groups for _ in g.samples]
        keys = [(g.prompt.id, s) for g in groups for s in g.samples]
        context = self.policy.encode([p.prompt_av for p in prompts])
        given = self._conditioning([p.first_frame_path for p in prompts])
        noise = self.initial_noise(keys, seed, iteration)
        draw = partial(self.step_noise, keys, seed, iteration)
        latents, trajectory = self._integrate(noise, context, adapter, given, draw)
        recorded = {name: t for recorder, _ in self.recorders for name, t in recorder.collect().items()}
        return Rollout(groups, latents, context, given, recorded, trajectory)

    def initial_noise(self, keys: list[tuple[str, int]], seed: int, iteration: int) -> Latents:
        """Standard normal latents of the clips named by `keys`."""
        return self._normal(keys, seed, iteration, (Purpose.SAMPLE_VIDEO, Purpose.SAMPLE_AUDIO))

    def step_noise(self, keys: list[tuple[str, int]], seed: int, iteration: int, step: int) -> Latents:
        """Standard normal noise of one step of the stochastic solver."""
        return self._normal(keys, seed, iteration, (Purpose.SDE_VIDEO, Purpose.SDE_AUDIO), step)

    def _normal(
        self,
        keys: list[tuple[str, int]],
        seed: int,
        iteration: int,
        purposes: tuple[Purpose, Purpose],
        number: int | None = None,
    ) -> Latents:
        g = self.geometry
        sizes = (g.video_tokens, g.video_channels), (g.audio_tokens, g.audio_channels)
        drawn = [keyed_normal(keys, z, seed, iteration, p, number) for z, p in zip(sizes, purposes, strict=True)]
        return Latents(*drawn).to(self.policy.device)

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

    def _integrate(
        self,
        noise: Latents,
        context: TextContext,
        adapter: AdapterName,
        given: Conditioning | None,
        draw: Callable[[int], Latents],
    ) -> tuple[Latents, Trajectory | None]:
        """Steps from noise to clean latents; given tokens are clean at every step, as in the stock pipeline.

        Args:
            draw: standard normal noise of a step.

        Returns:
            The clean latents, and the way there where it is asked for.
        """
        now = Latents(_with_given(noise.video, given), noise.audio)
        states = [now]
        log_probs: list[tuple[Tensor, Tensor]] = []
        negative = self._negative_context(len(noise))
        for step, sigma in enumerate(self.sigmas[:-1]):
            level = sigma.to(now.video.device).expand(len(noise))
            clean = self._guided(now, level, context, negative, adapter, given, step)
            moved, log_prob = self._step(now, clean, step, draw)
            now = Latents(_with_given(moved.video, given), moved.audio)
            if self.needs.trajectory:
                states.append(now)
                log_probs.append(log_prob)
        return now, self._trajectory(states, log_probs) if self.needs.trajectory else None

    def _step(
        self, now: Latents, clean: Latents, step: int, draw: Callable[[int], Latents]
    ) -> tuple[Latents, tuple[Tensor, Tensor]]:
        """One step of the solver, and its log-probabilities [B, Tv] and [B, Ta]: NaN where nothing was drawn."""
        sigma, after = self.sigmas[step], self.sigmas[step + 1]
        pairs = (now.video, clean.video), (now.audio, clean.audio)
        if self.needs.solver == "ode" or after == 0:
            moved = [ode_step(x, x0, sigma, after) for x, x0 in pairs]
            video, audio = (x.new_full(x.shape[:2], torch.nan) for x in moved)
            return Latents(*moved), (video, audio)
        noise = draw(step)
        normals = [sde_step(x, x0, sigma, after, self.needs.noise_level) for x, x0 in pairs]
        moved = [mean + std * n for (mean, std), n in zip(normals, (noise.video, noise.audio), strict=True)]
        video, audio = (step_log_prob(x, *normal) for x, normal in zip(moved, normals, strict=True))
        return Latents(*moved), (video, audio)

    def _trajectory(self, states: list[Latents], log_probs: list[tuple[Tensor, Tensor]]) -> Trajectory:
        sigmas = self.sigmas.to(states[0].video.device)
        return Trajectory(
            video=torch.stack([s.video for s in states], dim=1),
            audio=torch.stack([s.audio for s in states], dim=1),
            video_log_prob=torch.stack([v for v, _ in log_probs], dim=1),
            audio_log_prob=torch.stack([a for _, a in log_probs], dim=1),
            sigmas=sigmas.expand(len(states[0]), -1),
        )

    def _negative_context(self, batch: int) -> TextContext | None:
        if "text" not in weaker_predictions(self.sampling):
            return None
        return self.policy.encode([self.sampling.negative_prompt] * batch)

    def _guided(
        self,
        latents: Latents,
        sigma: Tensor,
        context: TextContext,
        negative: TextContext | None,
        adapter: AdapterName,
        given: Conditioning | None,
        step: int,
    ) -> Latents:
        """Prediction of the clean latents after guidance."""
        s = sigma[:, None, None]

        def clean(text: TextContext, mode: Mode = "joint") -> Latents:
            v = self.policy.velocity(
                latents, sigma, text, self.geometry, adapter, given, mode, self.sampling.stg_blocks
            )
            return Latents(latents.video - s * v.video, latents.audio - s * v.audio)

        for recorder, steps in self.recorders:
            recorder.recording = step in steps
        plain = clean(context)
        for recorder, _ in self.recorders:
            recorder.recording = False
        guidance = (self.sampling.video_guidance, self.sampling.audio_guidance)
        weaker: list[tuple[Latents, list[float]]] = []
        if negative is not None:
            weaker.append((clean(negative), [g.text - 1 for g in guidance]))
        wanted = weaker_predictions(self.sampling)
        if "stg" in wanted:
            weaker.append((clean(context, "stg"), [g.stg for g in guidance]))
        if "modality" in wanted:
            weaker.append((clean(context, "isolated"), [g.modality - 1 for g in guidance]))
        if not weaker:
            return plain
        video = guide(plain.video, [(w.video, scale[0]) for w, scale in weaker], guidance[0])
        audio = guide(plain.audio, [(w.audio, scale[1]) for w, scale in weaker], guidance[1])
        return Latents(video, audio)


def _with_given(video: Tensor, given: Conditioning | None) -> Tensor:
    """Latents [B, Tv, C] whose given tokens are what was given."""
    return video if given is None else torch.where(given.mask[..., None], given.video, video)


def weaker_predictions(sampling: SamplingConfig) -> tuple[Literal["text", "stg", "modality"], ...]:
    """What guidance leads away from, each a pass of the model beside the plain one in every step."""
    guidance = (sampling.video_guidance, sampling.audio_guidance)
    wanted: tuple[tuple[Literal["text", "stg", "modality"], bool], ...] = (
        ("text", any(g.text != 1.0 for g in guidance)),
        ("stg", any(g.stg for g in guidance)),
        ("modality", any(g.modality != 1.0 for g in guidance)),
    )
    return tuple(name for name, on in wanted if on)


def num_passes(sampling: SamplingConfig) -> int:
    """Forwards of the model for one clip: steps x (1 + guidance)."""
    return sampling.num_steps * (1 + len(weaker_predictions(sampling)))


def guide(clean: Tensor, weaker: list[tuple[Tensor, float]], guidance: GuidanceConfig) -> Tensor:
    """Push x0 [B, T, C] away from weaker predictions, then rescale per clip (Lin et al. 2023, section 3.4)."""
    guided = clean
    for other, scale in weaker:
        guided = guided + scale * (clean - other)
    if guidance.rescale > 0:
        ratio = clean.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True)
        guided = guidance.rescale * guided * ratio + (1 - guidance.rescale) * guided
    return guided


def collection_steps(num_steps: int, window: tuple[float, float] = (0.5, 0.9)) -> range:
    """Sampling steps whose attention is collected: int(0.5 n) to int(0.9 n), both included (OmniNFT's reference code).

    Late steps, where the picture stands and sounds have sources, but not the last ones, which only polish. Where few
    steps leave nothing else it is the one step at its start (the last step, if it starts at the end), so that a short
    sampler does not switch the technique off.

    Raises:
        ValueError: num_steps < 1, or a window outside 0 <= start <= stop <= 1.
    """
    low, high = window
    if num_steps < 1 or not 0 <= low <= high <= 1:
        raise ValueError(f"expected num_steps >= 1 and 0 <= start <= stop <= 1, found {num_steps} and {window}")
    start = min(int(low * num_steps), num_steps - 1)
    return range(start, max(min(int(high * num_steps) + 1, num_steps), start + 1))


def share_of(total: int, rank: int, world: int) -> slice:
    """The places of process `rank` of `world` among `total` clips in order."""
    return slice(rank * total // world, (rank + 1) * total // world)


def batches(
    groups: Sequence[PromptGroup], batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[PromptGroup, ...]]:
    """This process's share of the groups' clips, in order, in batches; a group may be cut between batches.

    Where the clips do not divide, shares differ by one; a process may have none.
    """
    clips = [(g.prompt, s) for g in groups for s in g.samples]
    mine = clips[share_of(len(clips), rank, world)]
    for start in range(0, len(mine), batch_size):
        yield regrouped(mine[start : start + batch_size])
