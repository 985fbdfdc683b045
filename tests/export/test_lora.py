"""An exported LoRA in a stock diffusers pipeline: the same clips, at the same strength."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omninft.config import SamplingConfig
from omninft.export.lora import FILE_NAME, export_lora, read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.models.test_ltx2 import PLAIN
from tests.random_models import groups, make_policy, random_pipeline, through_pipeline


def test_a_stock_pipeline_makes_the_same_clips(moved_policy: LTX2Policy, tmp_path: Path) -> None:
    policy = moved_policy
    sampler = RolloutSampler(policy, PLAIN)
    rollout = sampler.sample(groups(), 0, 0, "current")
    frames, waveform = policy.decode(rollout.latents, sampler.geometry)
    base = policy.decode(sampler.sample(groups(), 0, 0, "reference").latents, sampler.geometry)[0]
    export_lora(policy.adapters, tmp_path)
    stock = random_pipeline("ltx-2")
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    scalings = {float(s) for m in stock.transformer.modules() if hasattr(m, "scaling") for s in m.scaling.values()}
    assert scalings == {2.0}
    noise = sampler.initial_noise(rollout.clip_keys, 0, 0)
    made_frames, made_waveform = through_pipeline(stock, noise, PLAIN)
    assert np.abs(frames - made_frames).max() < 0.51
    assert np.abs(waveform - made_waveform).max() < 1e-4
    assert np.abs(frames.astype(int) - base.astype(int)).max() > 3  # the LoRA does something


def test_comes_back_bit_for_bit(moved_policy: LTX2Policy, tmp_path: Path) -> None:
    policy = moved_policy
    export_lora(policy.adapters, tmp_path)
    state, config = read_lora(tmp_path)
    assert (config.rank, config.alpha) == (2, 4.0)
    mine = policy.adapters.state("current")
    assert state.keys() == mine.keys()
    assert all(torch.equal(state[k], mine[k]) for k in mine)
    other = make_policy()
    other.adapters.load_state("current", state)
    a = RolloutSampler(policy, SamplingConfig(num_steps=2)).sample(groups(), 0, 0, "current")
    b = RolloutSampler(other, SamplingConfig(num_steps=2)).sample(groups(), 0, 0, "current")
    assert torch.equal(a.latents.video, b.latents.video)


def test_a_file_without_alpha_is_refused(moved_policy: LTX2Policy, tmp_path: Path) -> None:
    file = export_lora(moved_policy.adapters, tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    save_file(load_file(file), tmp_path / "bare" / FILE_NAME)
    with pytest.raises(OmniNFTError, match="without alpha its strength would be a guess"):
        read_lora(tmp_path / "bare")
    with pytest.raises(OmniNFTError, match="no LoRA at"):
        read_lora(tmp_path / "none")
