"""Three policies on one base: which adapter a forward reads, what trains, and the folded products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from omninft.config import LoraConfig, ModelConfig
from omninft.export.lora import export_lora
from omninft.models.adapters import DEFAULT_TARGETS, AdaptedLinear, AdapterSet, Switch, peft_config
from omninft.models.lora_file import read_lora
from omninft.models.ltx2 import LTX2Policy
from omninft.types import Latents, OmniNFTError
from tests.random_models import PROMPTS, SMALL, make_policy, random_pipeline

CONFIG = LoraConfig(rank=4, alpha=8)


def velocity(policy: LTX2Policy, adapter: str) -> Latents:
    torch.manual_seed(2)
    from omninft.config import SamplingConfig

    g = policy.geometry(SamplingConfig())
    noisy = Latents(torch.randn(2, g.video_tokens, 16), torch.randn(2, g.audio_tokens, 16))
    return policy.velocity(noisy, torch.tensor([0.5, 0.8]), policy.encode(PROMPTS), g, adapter)


def test_binds_the_28_linears_of_every_block() -> None:
    policy = make_policy()
    assert len(DEFAULT_TARGETS) == 28
    assert len(policy.adapters.layers) == 28 * len(policy.blocks)


def test_starts_with_three_equal_policies() -> None:
    policy = make_policy()
    made = [velocity(policy, name) for name in ("current", "old", "reference")]
    assert torch.equal(made[0].video, made[1].video)
    torch.testing.assert_close(made[0].video, made[2].video, atol=1e-6, rtol=1e-5)


def test_a_forward_reads_the_adapter_it_names(moved_policy: LTX2Policy) -> None:
    policy = moved_policy
    current, old = velocity(policy, "current"), velocity(policy, "old")
    assert (current.video - old.video).abs().max() > 1e-3
    policy.adapters.copy("current", "old")
    assert torch.equal(velocity(policy, "old").video, velocity(policy, "current").video)


def test_folded_products_equal_peft_own_forward(moved_policy: LTX2Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = moved_policy
    folded = velocity(policy, "current")
    policy.transformer.set_adapter("current")
    monkeypatch.setattr(AdaptedLinear, "forward", LoraLinear.forward)
    plain = velocity(policy, "current")
    torch.testing.assert_close(folded.video, plain.video, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(folded.audio, plain.audio, atol=1e-5, rtol=1e-4)


def test_only_current_trains_and_every_parameter_gets_a_gradient(moved_policy: LTX2Policy) -> None:
    policy = moved_policy
    assert all(".current." in name for name, _ in policy.adapters.named_parameters())
    # Predictions of the other two before and after must not touch what trains.
    with torch.no_grad():
        velocity(policy, "old")
        velocity(policy, "reference")
    with policy.adapters.using("current"):
        made = velocity(policy, "current")
        (made.video.square().mean() + made.audio.square().mean()).backward()
    with torch.no_grad():
        velocity(policy, "old")
    without = [name for name, p in policy.adapters.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad is None for n, p in policy.transformer.named_parameters() if ".current." not in n)


def test_checkpointing_recomputes_with_the_same_adapter(moved_policy: LTX2Policy) -> None:
    policy = moved_policy

    def gradients() -> list[torch.Tensor]:
        for p in policy.adapters.parameters():
            p.grad = None
        with policy.adapters.using("current"):
            made = velocity(policy, "current")
            (made.video.square().mean() + made.audio.square().mean()).backward()
        return [p.grad.clone() for p in policy.adapters.parameters() if p.grad is not None]

    plain = gradients()
    policy.transformer.enable_gradient_checkpointing()
    policy.transformer.train()
    again = gradients()
    assert len(plain) == len(again) == 2 * len(policy.adapters.layers)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_old_moves_by_the_decay(moved_policy: LTX2Policy) -> None:
    policy = moved_policy
    adapters = policy.adapters
    before = {k: v.clone() for k, v in adapters.state("old").items()}
    current = {k: v.clone() for k, v in adapters.state("current").items()}
    adapters.mix(0.25)
    for key, tensor in adapters.state("old").items():
        torch.testing.assert_close(tensor, 0.25 * before[key] + 0.75 * current[key])
    mixed = velocity(policy, "old")
    adapters.mix(0.0)
    assert all(torch.equal(v, current[k]) for k, v in adapters.state("old").items())
    # The folded weight of old is made anew after it moved.
    assert (velocity(policy, "old").video - mixed.video).abs().max() > 1e-4


def test_another_models_adapter_is_refused(moved_policy: LTX2Policy) -> None:
    policy = moved_policy
    state = {k: v.clone() for k, v in policy.adapters.state("current").items()}
    first = next(iter(state))
    with pytest.raises(OmniNFTError, match="has shape"):
        policy.adapters.load_state("old", state | {first: torch.zeros(1, 1)})
    del state[first]
    with pytest.raises(OmniNFTError, match="do not match this model"):
        policy.adapters.load_state("old", state)


def test_adapters_are_float32_on_a_bfloat16_base() -> None:
    from omninft.config import LoraConfig, ModelConfig
    from tests.random_models import SMALL, random_pipeline

    policy = LTX2Policy(
        random_pipeline("ltx-2").to(torch.bfloat16), ModelConfig(lora=LoraConfig(rank=2, alpha=4)), clip_defaults=SMALL
    )
    assert {p.dtype for p in policy.adapters.parameters()} == {torch.float32}
    made = velocity(policy, "current")
    assert made.video.dtype == torch.float32
    assert torch.isfinite(made.video).all()


def test_a_bfloat16_base_multiplies_in_bfloat16_from_float32_masters() -> None:
    torch.manual_seed(0)
    exact = AdaptedLinear(nn.Linear(24, 16), "current", peft_config(CONFIG), r=4, lora_alpha=8)
    rounded = AdaptedLinear(nn.Linear(24, 16).bfloat16(), "current", peft_config(CONFIG), r=4, lora_alpha=8)
    exact.base_layer.weight.data.copy_(rounded.base_layer.weight)
    exact.base_layer.bias.data.copy_(rounded.base_layer.bias)
    x = torch.randn(2, 9, 24).bfloat16()
    gradients = {}
    for layer in (exact, rounded):
        layer.lora_A.float(), layer.lora_B.float()
        layer.lora_B["current"].weight.data.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)))
        layer.lora_A["current"].weight.data.copy_(torch.randn(4, 24, generator=torch.Generator().manual_seed(2)))
        layer.set_up(Switch("current"))
        given = x.to(layer.base_layer.weight.dtype).requires_grad_()
        made = layer(given)
        made.square().mean().backward()
        assert made.dtype == given.dtype
        gradients[layer] = [layer.lora_A["current"].weight.grad, layer.lora_B["current"].weight.grad, given.grad]
    assert gradients[rounded][0].dtype == gradients[rounded][1].dtype == torch.float32
    for a, b in zip(gradients[rounded], gradients[exact], strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize("tokens", [7, 100])
def test_gradients_on_a_float32_base_are_those_of_the_written_formula(tokens: int) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(24, 16), "current", peft_config(CONFIG), r=4, lora_alpha=8)
    layer.set_up(Switch("current"))
    a, b = layer.lora_A["current"].weight, layer.lora_B["current"].weight
    b.data.normal_()
    x = torch.randn(tokens, 24)
    layer(x).square().mean().backward()
    w, bias, a64, b64 = (t.detach().double().requires_grad_() for t in (layer.weight, layer.bias, a, b))
    (x.double() @ (w + 2 * b64 @ a64).t() + bias).square().mean().backward()
    for found, exact in ((a.grad, a64.grad), (b.grad, b64.grad)):
        assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_old_may_be_kept_in_bfloat16(tmp_path: Path) -> None:
    policy = make_policy()
    adapters = AdapterSet(random_pipeline("ltx-2").transformer, policy.config.lora, 0, torch.bfloat16)
    for tensor in adapters.state("current").values():
        tensor.normal_()
    adapters.mix(0.25)
    for key, tensor in adapters.state("old").items():
        assert tensor.dtype == torch.bfloat16
        current = adapters.state("current")[key]
        assert current.dtype == torch.float32
    before = {k: v.clone() for k, v in adapters.state("old").items()}
    adapters.mix(0.5)
    for key, tensor in adapters.state("old").items():
        current = adapters.state("current")[key]
        assert torch.equal(tensor, (0.5 * before[key].float() + 0.5 * current).bfloat16())  # rounded once
    exported, _ = read_lora(export_lora(adapters, tmp_path, "old"))
    assert all(
        t.dtype == torch.float32 and torch.equal(t, adapters.state("old")[k].float()) for k, t in exported.items()
    )
    layer = adapters.layers[0]
    x = torch.randn(1, 2 * layer.in_features, layer.in_features)
    with adapters.using("old"):
        folded, apart = layer(x), torch.cat([layer(row) for row in x[0].split(1)])
    assert folded.dtype == torch.float32
    torch.testing.assert_close(folded[0], apart, atol=1e-5, rtol=1e-5)


def test_the_folded_old_is_forgotten_when_old_moves(moved_policy: LTX2Policy) -> None:
    adapters = moved_policy.adapters
    layer = adapters.layers[0]
    x = torch.randn(1, 2 * layer.in_features, layer.in_features)  # tokens enough for folding
    made = {}
    for name in ("old", "current"):
        with adapters.using(name):  # type: ignore[arg-type]
            made[name] = layer(x).detach()
    assert not torch.allclose(made["old"], made["current"])
    adapters.mix(0.0)
    with adapters.using("old"):
        torch.testing.assert_close(layer(x).detach(), made["current"])


def test_the_adapter_before_is_back_afterwards(moved_policy: LTX2Policy) -> None:
    adapters = moved_policy.adapters
    with adapters.using("current"):
        with adapters.using("old"):
            assert adapters.active == "old"
        assert adapters.active == "current"
    assert adapters.active == "reference"


def test_targets_that_name_nothing_are_refused_with_those_there_are() -> None:
    config = ModelConfig(lora=LoraConfig(targets=("attn1.to_q", "attn1.to_qq")))
    message = r"model\.lora\.targets: found 'attn1\.to_qq'.*did you mean 'attn1\.to_q'.*there are .*ff\.net\.2"
    with pytest.raises(OmniNFTError, match=message):
        LTX2Policy(random_pipeline("ltx-2"), config, clip_defaults=SMALL)
