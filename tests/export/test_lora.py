"""An exported LoRA in a stock diffusers pipeline, and by the rules of the other programs: all of it, at full strength.

A rule below is what a program's loader does with the keys of a file, written down from its source. It gets the file's
tensors and the names of the model's linears in the original implementation, and gives what is added to each weight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.evaluation.sampling import load_policy
from omninft.export import lora as lora_module
from omninft.export.lora import export_lora
from omninft.models.adapters import DEFAULT_TARGETS
from omninft.models.lora_file import FILE_NAME, METADATA_KEY, read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.models.test_ltx2 import PLAIN
from tests.random_models import SMALL, groups, random_pipeline, through_pipeline

Deltas = dict[str, Tensor]  # module name to [out, in]

# What diffusers' conversion of the original weights replaces in every key, in this order (huggingface/diffusers
# 58eb52c, scripts/convert_ltx2_to_diffusers.py), as far as linears are concerned.
CONVERSION = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "prompt_adaln_single": "prompt_adaln",
}
STARTS = {"adaln_single.": "time_embed.", "audio_adaln_single.": "audio_time_embed."}


def converted(original: str) -> str:
    """diffusers' name of a module of the original implementation."""
    for old, new in CONVERSION.items():
        original = original.replace(old, new)
    for old, new in STARTS.items():
        if original.startswith(old):
            return new + original.removeprefix(old)
    return original


def original_names(transformer: nn.Module) -> set[str]:
    """The transformer's linears as the original implementation names them."""
    back = {new: old for old, new in CONVERSION.items()} | {"time_embed": "adaln_single"}
    back["audio_time_embed"] = "audio_adaln_single"
    found = set()
    for name in linears(transformer):
        first, dot, rest = name.partition(".")
        original = back.get(first, first) + dot + rest
        assert converted(original) == name
        found.add(original)
    return found


def linears(transformer: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))


def comfyui(tensors: dict[str, Tensor], names: set[str]) -> Deltas:
    """Looks for each module under three names; keys that it did not look for are only warned of."""
    found = {}
    for name in names:
        for key in (f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}", name):
            if f"{key}.lora_A.weight" in tensors:
                a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
                alpha = tensors.get(f"{key}.alpha", torch.tensor(float(len(a))))
                found[name] = alpha / len(a) * (b @ a)
    return found


def wangp(tensors: dict[str, Tensor], names: set[str]) -> Deltas:
    """Strips prefixes; a key that names no module of the model is an error. Metadata is not read."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for prefix in ("model.", "diffusion_model.", "transformer."):
            key = key.removeprefix(prefix)
        name, _, part = key.removesuffix(".weight").rpartition(".")
        if name not in names:
            raise KeyError(key)
        parts.setdefault(name, {})[part] = tensor
    return {
        n: p.get("alpha", len(p["lora_A"])) / len(p["lora_A"]) * (p["lora_B"] @ p["lora_A"]) for n, p in parts.items()
    }


def ltx_core(tensors: dict[str, Tensor], names: set[str]) -> Deltas:
    """Takes `diffusion_model.` off, if there, and looks for each module; there is no alpha."""
    bare = {key.replace("diffusion_model.", ""): tensor for key, tensor in tensors.items()}
    keys = {name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in names}
    return {name: bare[b] @ bare[a] for name, (a, b) in keys.items() if a in bare and b in bare}


RULES = {"ComfyUI": comfyui, "WanGP": wangp, "ltx-core": ltx_core}


def stock_diffusers(folder: Path, version: str) -> Deltas:
    """What a stock pipeline that loaded the folder adds to each linear, by diffusers' own names."""
    stock = random_pipeline(version)
    stock.load_lora_weights(folder)
    found = {}
    for name, module in stock.transformer.named_modules():
        if hasattr(module, "lora_A"):
            (key,) = module.lora_A
            found[name] = module.scaling[key] * module.lora_B[key].weight @ module.lora_A[key].weight
    return found


def policy_deltas(policy: LTX2Policy) -> Deltas:
    """alpha / rank * B A of the current adapter."""
    state, config = policy.adapters.state("current"), policy.adapters.config
    names = {key.rpartition(".")[0] for key in state}
    return {n: config.alpha / config.rank * (state[f"{n}.lora_B"] @ state[f"{n}.lora_A"]) for n in names}


def assert_same(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=0)


def moved(alpha: float, version: str = "ltx-2", everywhere: bool = False) -> LTX2Policy:
    """A random policy, LoRA of rank 2 on the 28 targets of a block or on all linears, whose B is not 0."""
    pipeline = random_pipeline(version)
    targets = linears(pipeline.transformer) if everywhere else None
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=alpha, targets=targets))
    policy = LTX2Policy(pipeline, config, clip_defaults=SMALL)
    torch.manual_seed(1)
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    return policy


def earlier_export(policy: LTX2Policy, folder: Path) -> None:
    """As LoRAs were exported at first: `transformer.` keys, alpha in diffusers' metadata only."""
    config = policy.adapters.config
    LTX2Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={f"{k}.weight": t.contiguous() for k, t in policy.adapters.state("current").items()},
        weight_name=FILE_NAME,
        transformer_lora_adapter_metadata={
            "r": config.rank,
            "lora_alpha": config.alpha,
            "target_modules": list(DEFAULT_TARGETS),
        },
    )


@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_a_stock_pipeline_makes_the_same_clips(alpha: float, tmp_path: Path) -> None:
    policy = moved(alpha)
    sampler = RolloutSampler(policy, PLAIN)
    rollout = sampler.sample(groups(), 0, 0, "current")
    frames, waveform = policy.decode(rollout.latents, sampler.geometry)
    base = policy.decode(sampler.sample(groups(), 0, 0, "reference").latents, sampler.geometry)[0]
    export_lora(policy.adapters, tmp_path)
    stock = random_pipeline("ltx-2")
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    noise = sampler.initial_noise(rollout.clip_keys, 0, 0)
    made_frames, made_waveform = through_pipeline(stock, noise, PLAIN)
    assert np.abs(frames - made_frames).max() < 0.51
    assert np.abs(waveform - made_waveform).max() < 1e-4
    assert np.abs(frames.astype(int) - base.astype(int)).max() > 3  # the LoRA does something


@pytest.mark.parametrize(
    ("version", "everywhere"), [("ltx-2", False), ("ltx-2.5", False), ("ltx-2", True), ("ltx-2.3", True)]
)
@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_every_program_takes_all_of_it_at_full_strength(
    alpha: float, version: str, everywhere: bool, tmp_path: Path
) -> None:
    names = original_names(random_pipeline(version).transformer)
    policy = moved(alpha, version, everywhere)
    expected = policy_deltas(policy)
    assert len(expected) == (len(names) if everywhere else 2 * 28)
    tensors = load_file(export_lora(policy.adapters, tmp_path))
    for rule in RULES.values():
        found = rule(tensors, names)
        assert_same({converted(name): delta for name, delta in found.items()}, expected)
    assert_same(stock_diffusers(tmp_path, version), expected)


def test_the_rules_refuse_what_the_programs_refuse(tmp_path: Path) -> None:
    policy = moved(4.0)
    expected = policy_deltas(policy)
    names = original_names(random_pipeline("ltx-2").transformer)
    earlier_export(policy, tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    assert comfyui(tensors, names) == {}
    assert ltx_core(tensors, names) == {}
    assert_same({name: 2 * delta for name, delta in wangp(tensors, names).items()}, expected)
    assert_same(stock_diffusers(tmp_path, "ltx-2"), expected)
    with pytest.raises(KeyError, match="text_encoder"):
        wangp({"text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, names)


def test_keys_are_those_of_the_original_and_alpha_is_told_beside_them(tmp_path: Path) -> None:
    file = export_lora(moved(3.0).adapters, tmp_path)
    assert file == tmp_path / FILE_NAME
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    keys = {
        f"diffusion_model.transformer_blocks.{i}.{t}.lora_{p}.weight"
        for i in (0, 1)
        for t in DEFAULT_TARGETS
        for p in "AB"
    }
    with safe_open(file, framework="pt") as handle:
        assert set(handle.keys()) == keys
        assert handle.metadata().keys() == {METADATA_KEY}


@pytest.mark.parametrize("earlier", [False, True])
def test_comes_back_bit_for_bit(earlier: bool, tmp_path: Path) -> None:
    policy = moved(4.0)
    if earlier:
        earlier_export(policy, tmp_path)
    else:
        export_lora(policy.adapters, tmp_path)
    state, config = read_lora(tmp_path)
    assert (config.rank, config.alpha, config.targets) == (2, 4.0, DEFAULT_TARGETS)
    mine = policy.adapters.state("current")
    assert state.keys() == mine.keys()
    assert all(torch.equal(state[k], mine[k]) for k in mine)
    other = LTX2Policy(random_pipeline("ltx-2"), ModelConfig(lora=config), clip_defaults=SMALL)
    other.adapters.load_state("current", state)
    a = RolloutSampler(policy, SamplingConfig(num_steps=2)).sample(groups(), 0, 0, "current")
    b = RolloutSampler(other, SamplingConfig(num_steps=2)).sample(groups(), 0, 0, "current")
    assert torch.equal(a.latents.video, b.latents.video)


@pytest.mark.parametrize("alpha", [3.0, 0.7, 1e3])
def test_other_ratios_come_back_to_the_last_place(alpha: float, tmp_path: Path) -> None:
    policy = moved(alpha, "ltx-2.3", everywhere=True)
    export_lora(policy.adapters, tmp_path)
    state, config = read_lora(tmp_path)
    assert config == policy.adapters.config
    mine = policy.adapters.state("current")
    assert state.keys() == mine.keys()
    infinity = torch.tensor(torch.inf)
    for key, tensor in mine.items():
        last_place = torch.nextafter(tensor.abs(), infinity) - tensor.abs() if key.endswith("lora_B") else 0
        assert ((state[key] - tensor).abs() <= last_place).all()


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    files = [export_lora(moved(3.0).adapters, tmp_path / str(i)) for i in range(2)]
    files += [export_lora(moved(3.0).adapters, tmp_path / "0")]
    assert len({file.read_bytes() for file in files}) == 1
    assert files[0].read_bytes() != export_lora(moved(4.0).adapters, tmp_path / "other").read_bytes()


def test_the_file_follows_the_umask(tmp_path: Path) -> None:
    policy = moved(4.0)
    before = os.umask(0o027)
    try:
        file = export_lora(policy.adapters, tmp_path)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export_lora(moved(4.0).adapters, tmp_path)
    whole = file.read_bytes()

    def full(tensors: dict[str, Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_module, "save_file", full)
    with pytest.raises(OmniNFTError, match=rf"{FILE_NAME}: cannot be written \(.*No space left"):
        export_lora(moved(3.0).adapters, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    assert file.read_bytes() == whole


def _with_an_alpha_key(file: Path) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    alpha = {"diffusion_model.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(4.0)}
    save_file(load_file(file) | alpha, file, metadata=metadata)


def _with_metadata(text: str) -> Callable[[Path], None]:
    return lambda file: save_file(load_file(file), file, metadata={METADATA_KEY: text})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_metadata('{"rank": 2, "targets": []}'), "KeyError: 'alpha'"),
        (_with_metadata('{"rank": 2, "alpha": 0, "targets": []}'), "does not say its rank, alpha and targets"),
        (_with_metadata("[]"), "does not say its rank, alpha and targets"),
        (_with_metadata("{"), "does not say its rank, alpha and targets"),
        (_with_an_alpha_key, r"found the tensor diffusion_model\.transformer_blocks\.0\.attn1\.to_q\.alpha"),
        (lambda file: file.write_bytes(b"no safetensors"), "cannot be read as a safetensors file"),
        (Path.unlink, "no LoRA at"),
    ],
)
def test_other_files_are_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    file = export_lora(moved(4.0).adapters, tmp_path)
    spoil(file)
    with pytest.raises(OmniNFTError, match=message):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "found no tensors"),
        ({"lora_A": torch.zeros(3, 4)}, r"lora_A\.weight has shape \[3, 4\], expected \[2, features\]"),
        ({"lora_B": torch.zeros(2, 3)}, r"lora_B\.weight has shape \[2, 3\], expected \[features, 2\]"),
        ({"lora_A": torch.zeros(2)}, r"has shape \[2\]"),
        ({"lora_A": torch.full((2, 4), torch.inf)}, "holds values that are not finite"),
    ],
)
def test_tensors_that_no_adapter_has_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    named = {f"diffusion_model.b.to_q.{name}.weight": tensor for name, tensor in tensors.items()}
    about = json.dumps({"rank": 2, "alpha": 2, "targets": ["to_q"]})
    save_file(named, tmp_path / "l.safetensors", metadata={METADATA_KEY: about})
    with pytest.raises(OmniNFTError, match=rf"l\.safetensors: .*{message}"):
        read_lora(tmp_path / "l.safetensors")


def test_a_lora_of_another_model_is_named(tmp_path: Path) -> None:
    about = json.dumps({"rank": 2, "alpha": 2, "targets": ["attn1.to_q"]})
    named = [f"diffusion_model.transformer_blocks.0.attn1.to_q.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.ones(2, 2) for name in named}, tmp_path / "l.safetensors", metadata={METADATA_KEY: about})
    with pytest.raises(OmniNFTError, match=r"l\.safetensors: 2 of 2 tensors have no place in this model"):
        load_policy("tiny", tmp_path / "l.safetensors")
