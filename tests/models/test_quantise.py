"""Adapters on frozen weights of every kind: gradients are those of the dequantised weights."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.credit.surgery import GradientSurgery
from omninft.models.ltx2 import LTX2Policy
from omninft.models.quantise import PACKAGES, block_linears, quantise_base
from omninft.types import Latents, OmniNFTError, Recording
from tests.random_models import PROMPTS, SMALL, random_pipeline

KINDS = list(PACKAGES)


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def dequantised(linear: nn.Linear) -> Tensor:
    """[out, in], by what the layer makes of each unit vector."""
    made = linear(torch.eye(linear.in_features))
    return (made if linear.bias is None else made - linear.bias).t().contiguous()


def eight_bit_by_bitsandbytes(transformer: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    for name, linear in block_linears(transformer).items():
        made = Linear8bitLt(
            linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
        )
        made.weight, made.bias = Int8Params(linear.weight.data, requires_grad=False), linear.bias
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, made.to("cpu"))


def plain_twin(transformer: nn.Module) -> nn.Module:
    """The same model with plain float32 weights that say what the quantised ones say."""
    twin = random_pipeline("ltx-2.3").transformer.requires_grad_(False)
    for name, linear in block_linears(twin).items():
        linear.weight.data.copy_(dequantised(transformer.get_submodule(name)))  # type: ignore[arg-type]
    return twin


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, as a share."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (found, expected))
    return float((a - b).norm() / b.norm())


def results(transformer: nn.Module, target: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Velocity, recordings, and gradients with surgery and checkpointing."""
    pipeline = random_pipeline("ltx-2.3")
    pipeline.transformer = transformer
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=4), gradient_checkpointing=True)
    policy = LTX2Policy(pipeline, config, clip_defaults=SMALL)
    policy.transformer.train()
    torch.manual_seed(1)
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    surgery = GradientSurgery(policy.sites, [0.0, 0.5], [0.5, 1.0], target)
    recorders = [policy.recorder(Recording("v2a_columns")), policy.recorder(Recording("responses"))]
    for recorder in recorders:
        recorder.recording = True
    g = policy.geometry(SamplingConfig())
    noisy = Latents(torch.randn(2, g.video_tokens, 16), torch.randn(2, g.audio_tokens, 16))
    with policy.adapters.using("current"), surgery:
        made = policy.velocity(noisy, torch.tensor([0.5, 0.8]), policy.encode(PROMPTS), g, "current")
        recorded = {k: v for r in recorders for k, v in r.collect().items()}
        for recorder in recorders:
            recorder.recording = False
        (made.video.square().mean() + made.audio.square().mean()).backward()
    surgery.check_fired()
    return made.video.detach(), recorded, [p.grad for p in policy.adapters.parameters() if p.grad is not None]


@pytest.mark.parametrize("target", ["input", "projection"])
@pytest.mark.parametrize("kind", [*KINDS, "bitsandbytes int8"])
def test_equals_plain_layers_with_the_dequantised_weights(kind: Any, target: str) -> None:
    need("torchao" if PACKAGES.get(kind) == "torchao" else "bitsandbytes")
    transformer = random_pipeline("ltx-2.3").transformer.requires_grad_(False)
    names = list(block_linears(transformer))
    # Weights of the bitsandbytes layers in 8 bits are rounded together with each input, not once for all.
    tolerance = 5e-2 if kind == "bitsandbytes int8" else 2e-5
    before = {name: transformer.get_submodule(name).weight.clone() for name in names}
    if kind == "bitsandbytes int8":
        eight_bit_by_bitsandbytes(transformer)
    else:
        quantise_base(transformer, kind, "cpu")
    assert all(
        not torch.equal(dequantised(transformer.get_submodule(n)), before[n]) for n in names if n.endswith("to_q")
    )
    twin = plain_twin(transformer)
    made, recorded, gradients = results(transformer, target)
    expected, recorded_plain, plain = results(twin, target)
    assert distance([made], [expected]) < tolerance
    assert recorded.keys() == recorded_plain.keys()
    for name, value in recorded.items():
        assert distance([value], [recorded_plain[name]]) < tolerance, name
    assert len(gradients) == len(plain) == 2 * 28 * 2
    assert distance(gradients, plain) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_blocks_shrink_and_nothing_else_changes(kind: Any) -> None:
    need(PACKAGES[kind])
    transformer = random_pipeline("ltx-2.3").transformer.requires_grad_(False)
    untouched = [
        n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n not in block_linears(transformer)
    ]
    quantise_base(transformer, kind, "cpu")
    assert "proj_in" in untouched
    assert "transformer_blocks.0.attn1.to_gate_logits" in untouched
    assert all(type(transformer.get_submodule(n).weight) is nn.Parameter for n in untouched)
    assert transformer.dtype == torch.float32
    wide = nn.Module()
    wide.transformer_blocks = nn.ModuleList([nn.Linear(256, 256)])
    quantise_base(wide, kind, "cpu")
    weight: Any = wide.transformer_blocks[0].weight
    parts = (
        [weight, weight.quant_state.absmax]
        if kind == "nf4"
        else [getattr(weight, n) for n in weight.__tensor_flatten__()[0]]
    )
    # A byte for each weight and a float for each row, or half a byte and a byte for each 64.
    expected = 256 * 256 // 2 + 256 * 256 // 64 if kind == "nf4" else 256 * 256 + 4 * 256
    assert sum(t.nbytes for t in parts if isinstance(t, Tensor)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_one_line(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in list(sys.modules):
        if module.split(".")[0] == PACKAGES[kind]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(OmniNFTError, match=rf"{kind} needs {PACKAGES[kind]} .*omninft\[quantised\]"):
        quantise_base(random_pipeline("ltx-2").transformer, kind, "cpu")
