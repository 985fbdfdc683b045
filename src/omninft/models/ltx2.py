"""A joint audio-video policy over diffusers' LTX-2 family (2, 2.3, 2.5).

Everything that differs between versions and sizes is read from the checkpoint's configs here; no other stage asks
which model it is. Correspondence with the pipeline: v = eps - x0, timesteps are 1000 sigma in float32, video latents
pack as `b c f h w -> b (f h w) c`, audio latents as `b c t m -> b t (c m)`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args
from weakref import WeakSet

import numpy as np
import torch
from diffusers import LTX2Pipeline
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from omninft.config import ModelConfig, SamplingConfig
from omninft.models.adapters import AdapterSet
from omninft.models.compiling import compile_blocks, uncompiled
from omninft.models.contexts import ContextCache
from omninft.models.loading import (
    LTX2_CLIP,
    ClipDefaults,
    load_pipeline,
    load_text,
    read_clip_defaults,
    text_identity,
)
from omninft.models.lora_file import at_rank, bind, lora_shapes, read_lora
from omninft.models.offload import BlockStream
from omninft.models.protocol import AdapterName, CrossSite, Direction, Mode, Recorder, TrainedName
from omninft.models.recording import ResponseRecorder, V2ARecorder
from omninft.models.versions import FIRST_FRAME_CRF, STG_BLOCK, Version, version_of
from omninft.types import Conditioning, Geometry, Latents, Modality, OmniNFTError, Recording, TextContext

# A block's cross-modal attentions, and the modules that write into the audio stream.
CROSS_ATTENTIONS: tuple[tuple[Direction, str], ...] = (("a2v", "audio_to_video_attn"), ("v2a", "video_to_audio_attn"))
TEXT_BYTES = 2**30  # of text contexts kept on the device
_AUDIO_MODULES = ("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff")


def cross_sites(blocks: Sequence[nn.Module]) -> tuple[CrossSite, ...]:
    """The places where the streams of LTX-2's blocks read each other.

    Raises:
        OmniNFTError: a block without such a module.
    """
    sites = tuple(
        CrossSite(number, direction, block, name)
        for number, block in enumerate(blocks)
        for direction, name in CROSS_ATTENTIONS
    )
    for site in sites:
        site.find(site.attention)
    return sites


def _num_bytes(context: TextContext) -> int:
    return context.video.nbytes + context.audio.nbytes + context.mask.nbytes


def stream_of(parameter: str) -> Modality:
    """Which stream the module that owns this parameter writes to: audio_to_video_attn writes into the video stream."""
    return "audio" if any(f".{m}." in parameter for m in _AUDIO_MODULES) else "video"


class LTX2Policy:
    """One frozen pipeline, its adapters, and the calls that stages make on them."""

    def __init__(
        self, pipeline: LTX2Pipeline, config: ModelConfig, seed: int = 0, clip_defaults: ClipDefaults = LTX2_CLIP
    ) -> None:
        self.pipeline = pipeline
        self.config = config
        self.clip_defaults = clip_defaults
        self.transformer: nn.Module = pipeline.transformer
        self.device: torch.device = pipeline.device
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.adapters = AdapterSet(self.transformer, config.lora, seed, getattr(torch, config.old_dtype))
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        if config.compile:
            compile_blocks(self.transformer)
        if config.vae_tiling:
            pipeline.vae.enable_tiling()
        if config.offload == "blocks":
            for layer in self.adapters.layers:
                layer.foldable = False  # a folded weight would stay on the device
            self.stream = BlockStream(self.blocks, self.device)
        self.contexts: ContextCache | None = None  # on disk
        self._text: OrderedDict[str, TextContext] = OrderedDict()  # the least recently used first
        self._coords: dict[tuple[Geometry, int], tuple[Tensor, Tensor]] = {}
        self._recorders: WeakSet[Recorder] = WeakSet()
        self._masks = WeakTensorKeyDictionary()  # text mask -> whether it masks anything
        for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"):
            setattr(self.transformer, name, CachedRotary(getattr(self.transformer, name)))

    @classmethod
    def load(cls, config: ModelConfig, seed: int = 0) -> LTX2Policy:
        """The policy of a config; the LoRA's first draw is keyed by `seed`, or it starts from `config.lora.init`.

        Raises:
            OmniNFTError: a model or a LoRA that cannot be loaded, or a LoRA that is not this model's or of this rank.
        """
        init = config.lora.init
        start = None if init is None else at_rank(*read_lora(Path(init)), config.lora)
        pipeline = load_pipeline(config)
        if start is not None:  # before adapters are made for what is not there
            bind(start, lora_shapes(pipeline.transformer, config.lora.rank), str(init), config.lora.init_partial)
        policy = cls(pipeline, config, seed, read_clip_defaults(config.path))
        if config.text_cache is not None:
            policy.contexts = ContextCache(Path(config.text_cache), text_identity(config))
        if start is not None:
            policy.start_from(start)
        return policy

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Make a LoRA's tensors current and old; modules that it does not have start with B = 0.

        Raises:
            OmniNFTError: tensors that this model has no place for, unless `config.lora.init_partial`.
        """
        lora = self.config.lora
        bound = bind(state, self.adapters.state("current"), str(lora.init), lora.init_partial)
        for name in get_args(TrainedName):
            self.adapters.load_state(name, bound)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks."""
        return self.transformer.transformer_blocks  # type: ignore[return-value]

    @property
    def trainables(self) -> AdapterSet:
        """The adapters: current, old, and reference without any."""
        return self.adapters

    @property
    def sites(self) -> tuple[CrossSite, ...]:
        """Both cross-modal attentions of every block."""
        return cross_sites(self.blocks)

    @property
    def version(self) -> Version:
        """Which LTX-2 it is, from the transformer's configuration."""
        return version_of(self.pipeline.transformer.config)

    @property
    def first_frame_crf(self) -> int:
        """H.264 quality of given first frames; 0: they are taken as they are."""
        for chosen in (self.config.first_frame_crf, self.clip_defaults.first_frame_crf):
            if chosen is not None:
                return chosen
        return FIRST_FRAME_CRF[self.version]

    @property
    def facts(self) -> dict[str, int]:
        """Counts for people."""
        parameters = sum(p.numel() for _, p in self.adapters.named_parameters())
        modules = len(self.adapters.layers)
        return {"blocks": len(self.blocks), "lora_modules": modules, "lora_parameters": parameters}

    def stream_of(self, parameter: str) -> Modality:
        """Which stream the module that owns this parameter writes to."""
        return stream_of(parameter)

    def recorder(self, recording: Recording) -> Recorder:
        """Hooks on the cross-modal attentions that record while told to.

        Raises:
            OmniNFTError: a first block that the model does not have.
        """
        first = recording.first_block
        first = int(first * len(self.blocks)) if isinstance(first, float) else first
        made: Recorder
        if recording.kind == "responses":
            made = ResponseRecorder([site for site in self.sites if site.block >= first])
        else:
            made = V2ARecorder(self.blocks, None, first, recording.rope, recording.value_weighted)
        self._recorders.add(made)
        return made

    def geometry(self, sampling: SamplingConfig) -> Geometry:
        """Sizes of the clips that `sampling` asks for; what it leaves out is the model's training size.

        Raises:
            OmniNFTError: a size the autoencoders cannot take.
        """
        pipe, transformer, default = self.pipeline, self.pipeline.transformer.config, self.clip_defaults
        frames = sampling.num_frames or default.num_frames
        height, width = sampling.height or default.height, sampling.width or default.width
        rate = sampling.frame_rate or default.frame_rate
        every, side = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
        if (frames - 1) % every:
            low = (frames - 1) // every * every + 1
            raise OmniNFTError(
                f"sampling.num_frames: found {frames}, expected {every}k + 1 frames, e.g. {low} or {low + every}"
            )
        step = max(side, 32)  # what LTX2Pipeline itself demands
        for name, value in (("height", height), ("width", width)):
            if value % step:
                low = value // step * step
                near = f"{low} or {low + step}" if low else str(step)
                raise OmniNFTError(f"sampling.{name}: found {value} pixels, expected a multiple of {step}, e.g. {near}")
        tokens_per_second = pipe.audio_sampling_rate / pipe.audio_hop_length / pipe.audio_vae_temporal_compression_ratio
        return Geometry(
            num_frames=frames,
            height=height,
            width=width,
            frame_rate=rate,
            latent_frames=(frames - 1) // every + 1,
            latent_height=height // side,
            latent_width=width // side,
            video_channels=transformer.in_channels,
            audio_tokens=round(frames / rate * tokens_per_second),
            audio_channels=transformer.audio_in_channels,
            sample_rate=pipe.vocoder.config.output_sampling_rate,
        )

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse guidance that this model would silently ignore.

        Raises:
            OmniNFTError: spatio-temporal guidance with blocks that do not exist, without blocks on a model that lacks
                its version's own, or on a model whose attention cannot be perturbed.
        """
        if not (sampling.video_guidance.stg or sampling.audio_guidance.stg):
            return
        own = STG_BLOCK[self.version]
        if not sampling.stg_blocks and own >= len(self.blocks):
            raise OmniNFTError(
                "spatio-temporal guidance is on, but sampling.stg_blocks names no block, and that of "
                f"LTX-{self.version}, {own}, is none of this model's {len(self.blocks)}"
            )
        missing = [b for b in sampling.stg_blocks if not 0 <= b < len(self.blocks)]
        if missing:
            raise OmniNFTError(f"sampling.stg_blocks: found {missing}, expected blocks 0 to {len(self.blocks) - 1}")
        if not self.transformer.config.perturbed_attn:  # type: ignore[union-attr]
            raise OmniNFTError("this model's config has perturbed_attn: false; it cannot do spatio-temporal guidance")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Text contexts of prompts, [B, L, D] and [B, L, Da]; the last `TEXT_BYTES` of them are kept on the device.

        Prompts go through the encoder one by one: the same prompt then has the same bits whatever came with it.
        """
        found: dict[str, TextContext] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._text:
                self._text[prompt] = self._encode_one(prompt)
            self._text.move_to_end(prompt)
            found[prompt] = self._text[prompt]
            room = max(1, TEXT_BYTES // _num_bytes(found[prompt]))
            while len(self._text) > room:
                self._text.popitem(last=False)
        return TextContext.cat([found[p] for p in prompts])

    def _encode_one(self, prompt: str) -> TextContext:
        kept = self.contexts.read(prompt) if self.contexts is not None else None
        if kept is not None:
            return TextContext(*(part.to(self.device) for part in (kept.video, kept.audio, kept.mask)))
        pipe = self.pipeline
        if pipe.text_encoder is None or pipe.connectors is None:
            load_text(pipe, self.config)
        length = self.config.max_text_tokens or min(pipe.tokenizer_max_length, 1024)
        embeds, mask, _, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        side = getattr(pipe.tokenizer, "padding_side", "left")
        video, audio, mask = pipe.connectors(embeds.to(pipe.connectors.dtype), mask, padding_side=side)
        context = TextContext(video, audio, mask)
        if self.contexts is not None:
            self.contexts.write(prompt, context)
        return context

    def free_text_encoder(self) -> None:
        """Let go of text encoder and connectors; a prompt whose context is not kept loads them again."""
        self.pipeline.register_modules(text_encoder=None, connectors=None)

    @torch.no_grad()
    def prepare_texts(self, prompts: Sequence[str]) -> None:
        """Put the contexts of prompts on disk, and let go of what made them.

        Raises:
            OmniNFTError: `config.text_cache` names no folder.
        """
        if self.contexts is None:
            raise OmniNFTError("model.text_cache: expected a folder for the text contexts of all prompts")
        for prompt in dict.fromkeys(prompts):
            if not self.contexts.file(prompt).is_file():
                self._encode_one(prompt)
        self.free_text_encoder()

    def sigmas(self, num_steps: int, geometry: Geometry, shift_tokens: int | None = None) -> Tensor:
        """The sampling schedule of the checkpoint's scheduler, [num_steps + 1] float32, from 1 down to 0.

        A scheduler that shifts does so for `shift_tokens` video tokens, by default for those of the clip.

        Raises:
            OmniNFTError: fewer steps than the scheduler can shift.
        """
        scheduler = self.pipeline.scheduler
        mu = calculate_shift(
            shift_tokens or geometry.video_tokens,
            scheduler.config.get("base_image_seq_len", 1024),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.95),
            scheduler.config.get("max_shift", 2.05),
        )
        scheduler.set_timesteps(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        sigmas = scheduler.sigmas.float().cpu()
        if not sigmas.isfinite().all():  # a last noise level that is also the first
            raise OmniNFTError(f"num_steps: found {num_steps}, expected at least 2 with this model's scheduler")
        return sigmas

    def velocity(
        self,
        latents: Latents,
        sigma: Tensor,
        context: TextContext,
        geometry: Geometry,
        adapter: AdapterName,
        conditioning: Conditioning | None = None,
        mode: Mode = "joint",
        stg_blocks: Sequence[int] = (),
    ) -> Latents:
        """Velocity eps - x0 of noisy latents at `sigma` [B] float32, both modalities, float32.

        Given tokens are put in clean and told sigma 0. The caller keeps the adapter active through a backward
        (`adapters.using`), because activation checkpointing computes forwards again in it.
        """
        video, timestep = latents.video, 1000.0 * sigma
        video_timestep = timestep
        if conditioning is not None:
            video = torch.where(conditioning.mask[..., None], conditioning.video, video)
            video_timestep = timestep[:, None] * ~conditioning.mask
        video_coords, audio_coords = self._coordinates(geometry, len(latents))
        mask = context.mask if self._masks_anything(context.mask) else None
        keyframes = self._keyframes(geometry, video) if self.config.mark_first_frame else None
        recording = any(recorder.recording for recorder in self._recorders)
        with self.adapters.using(adapter), uncompiled(self.config.compile and recording):
            made_video, made_audio = self.transformer(
                hidden_states=video.to(self.dtype),
                audio_hidden_states=latents.audio.to(self.dtype),
                encoder_hidden_states=context.video,
                audio_encoder_hidden_states=context.audio,
                timestep=video_timestep,
                audio_timestep=timestep,
                sigma=timestep,
                audio_sigma=timestep,
                encoder_attention_mask=mask,
                audio_encoder_attention_mask=mask,
                video_coords=video_coords,
                audio_coords=audio_coords,
                video_keyframes_mask=keyframes,
                isolate_modalities=mode == "isolated",
                spatio_temporal_guidance_blocks=self._stg_blocks(stg_blocks) if mode == "stg" else None,
                use_cross_timestep=True,
                return_dict=False,
            )
        return Latents(made_video.float(), made_audio.float())

    def _stg_blocks(self, chosen: Sequence[int]) -> list[int]:
        return list(chosen) or [STG_BLOCK[self.version]]

    def _keyframes(self, geometry: Geometry, video: Tensor) -> Tensor | None:
        """[1, Tv, 1]: 1 at tokens of the first latent frame, which holds one frame; None where the model has no use."""
        if not self.pipeline.transformer.config.use_keyframes_abs_pos_embedding:
            return None
        mask = torch.zeros(1, geometry.video_tokens, 1, device=video.device)
        mask[:, : geometry.latent_height * geometry.latent_width] = 1
        return mask

    def _masks_anything(self, mask: Tensor) -> bool:
        """Ones alone (always so after the connectors' registers) are no mask, with which flash attention is ruled out.

        Asked once of a tensor, because the answer waits for the device.
        """
        if mask not in self._masks:
            self._masks[mask] = not bool((mask == 1).all())
        return bool(self._masks[mask])

    def _coordinates(self, geometry: Geometry, batch: int) -> tuple[Tensor, Tensor]:
        key = (geometry, batch)
        if key not in self._coords:
            transformer, g = self.pipeline.transformer, geometry
            video = transformer.rope.prepare_video_coords(
                batch, g.latent_frames, g.latent_height, g.latent_width, self.device, fps=g.frame_rate
            )
            audio = transformer.audio_rope.prepare_audio_coords(batch, g.audio_tokens, self.device)
            self._coords[key] = video, audio
        return self._coords[key]

    @torch.no_grad()
    def encode_first_frame(self, frames: Tensor, geometry: Geometry) -> Conditioning:
        """Condition on given first frames, uint8 [B, H, W, 3]: their tokens are kept clean.

        They are compressed first as the model's training clips were (`first_frame_crf`).
        """
        pipe = self.pipeline
        crf = self.first_frame_crf
        if crf:
            frames = torch.from_numpy(np.stack([apply_image_conditioning_crf(f, crf) for f in frames.cpu().numpy()]))
        pixels = frames.permute(0, 3, 1, 2)[:, :, None].to(self.device, pipe.vae.dtype) / 127.5 - 1
        first = pipe.vae.encode(pixels).latent_dist.mode().float()
        vae = pipe.vae
        first = pipe._normalize_latents(
            first, vae.latents_mean.float(), vae.latents_std.float(), vae.config.scaling_factor
        )
        tokens = pipe._pack_latents(first)
        video = torch.zeros(len(frames), geometry.video_tokens, geometry.video_channels, device=self.device)
        video[:, : tokens.shape[1]] = tokens
        mask = torch.zeros(len(frames), geometry.video_tokens, dtype=torch.bool, device=self.device)
        mask[:, : tokens.shape[1]] = True
        return Conditioning(video, mask)

    @torch.no_grad()
    def decode(self, latents: Latents, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 [B, T, H, W, 3] and waveforms float32 [B, channels, N] in -1..1."""
        pipe, g = self.pipeline, geometry
        vae, audio_vae = pipe.vae, pipe.audio_vae
        video = pipe._unpack_latents(latents.video, g.latent_frames, g.latent_height, g.latent_width)
        video = pipe._denormalize_latents(
            video, vae.latents_mean.float(), vae.latents_std.float(), vae.config.scaling_factor
        )
        # With a decode noise of 0, timestep-conditioned decoders are told that the latents are clean.
        timestep = (
            torch.zeros(len(latents), device=self.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        )
        frames = vae.decode(video.to(vae.dtype), timestep, return_dict=False)[0].float()
        frames = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        audio = pipe._denormalize_audio_latents(
            latents.audio, audio_vae.latents_mean.float(), audio_vae.latents_std.float()
        )
        mel_bins = audio_vae.config.mel_bins // pipe.audio_vae_mel_compression_ratio
        audio = pipe._unpack_audio_latents(audio, g.audio_tokens, num_mel_bins=mel_bins)
        mel = audio_vae.decode(audio.to(audio_vae.dtype), return_dict=False)[0]
        waveform = pipe.vocoder(mel.to(pipe.vocoder.dtype)).float().clamp(-1, 1)
        return frames.permute(0, 2, 3, 4, 1).cpu().numpy(), waveform.cpu().numpy()


class CachedRotary(nn.Module):
    """A rotary embedding that computes each set of positions once: they do not change between the calls of a run."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._kept: dict[tuple[int, ...], tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)

    def forward(self, coords: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        key = (*coords.shape, coords.data_ptr())
        kept = self._kept.get(key)
        if kept is None:
            # All clips of a batch have the same positions: compute one and view it as many.
            single = self.rotary(coords[:1], device=device)
            batch = coords.shape[0]
            made = tuple(t.expand(batch, *t.shape[1:]) for t in single)
            if not torch.equal(coords, coords[:1].expand_as(coords)):
                made = self.rotary(coords, device=device)
            if len(self._kept) > 16:
                self._kept.clear()
            kept = self._kept[key] = (coords, made)  # holding coords keeps its address from being used again
        return kept[1]
