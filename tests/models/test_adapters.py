"""Three policies on one base: which adapter a forward reads, what trains, and the folded products."""

from __future__ import annotations

import pytest
import torch

from omninft.config import LoraConfig, ModelConfig
from omninft.models.adapters import DEFAULT_TARGETS
from omninft.models.ltx2 import LTX2Policy
from omninft.types import Latents, OmniNFTError
from tests.random_models import PROMPTS, SMALL, make_policy, random_pipeline


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


def test_folded_products_equal_peft_own_forward(moved_policy: LTX2Policy) -> None:
    policy = moved_policy
    folded = velocity(policy, "current")
    policy.transformer.set_adapter("current")
    for layer in policy.adapters.layers:
        del layer.__dict__["forward"]
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
            assert {f.active for f in adapters._forwards} == {"old"}
        assert {f.active for f in adapters._forwards} == {"current"}
    assert {f.active for f in adapters._forwards} == {"reference"}


def test_targets_that_name_nothing_are_refused_with_those_there_are() -> None:
    config = ModelConfig(lora=LoraConfig(targets=("attn1.to_q", "attn1.to_qq")))
    message = r"model\.lora\.targets: found 'attn1\.to_qq'.*did you mean 'attn1\.to_q'.*there are .*ff\.net\.2"
    with pytest.raises(OmniNFTError, match=message):
        LTX2Policy(random_pipeline("ltx-2"), config, clip_defaults=SMALL)
