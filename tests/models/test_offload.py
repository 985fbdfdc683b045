"""Blocks that come from the host one by one: the same numbers, and few of them at a time."""

from __future__ import annotations

import importlib.util
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.credit.surgery import GradientSurgery
from omninft.models.ltx2 import LTX2Policy
from omninft.models.offload import BlockStream, staying_on_the_host
from omninft.models.quantise import quantise_base
from omninft.types import Latents
from tests.random_models import PROMPTS, SMALL, random_pipeline

BLOCKS = 5


def make(offload: str, kind: Any = None) -> LTX2Policy:
    pipeline = random_pipeline("ltx-2", BLOCKS)
    pipeline.transformer.requires_grad_(False)
    quantise_base(pipeline.transformer, kind, "cpu")
    lora = LoraConfig(rank=2, alpha=4)
    config = ModelConfig(lora=lora, gradient_checkpointing=True, offload=offload)  # type: ignore[arg-type]
    policy = LTX2Policy(pipeline, config, clip_defaults=SMALL)
    for layer in policy.adapters.layers:
        layer.foldable = False
    policy.transformer.train()
    torch.manual_seed(1)
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    return policy


def results(policy: LTX2Policy) -> list[Tensor]:
    """A prediction of old, and gradients of current with surgery."""
    surgery = GradientSurgery(policy.sites, [0.0, 0.1, 1.0, 0.5, 1.0])
    g = policy.geometry(SamplingConfig())
    torch.manual_seed(2)
    noisy = Latents(torch.randn(2, g.video_tokens, 16), torch.randn(2, g.audio_tokens, 16))
    given = noisy, torch.tensor([0.5, 0.8]), policy.encode(PROMPTS), g
    with torch.no_grad():
        old = policy.velocity(*given, "old").video
    with policy.adapters.using("current"), surgery:
        made = policy.velocity(*given, "current")
        (made.video.square().mean() + made.audio.square().mean()).backward()
    surgery.close()
    return [old, *(p.grad for p in policy.adapters.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [None, "int8"])
def test_numbers_are_those_of_resident_blocks(kind: Any) -> None:
    if kind is not None and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    policy = make("blocks", kind)
    pairs = zip(results(policy), results(make("none", kind)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_few_blocks_are_on_the_device_at_a_time_and_adapters_never_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make("blocks")
    adapters = [p.data_ptr() for p in policy.adapters.parameters()]
    copies: list[weakref.ref[Tensor]] = []
    seen: list[tuple[int, int]] = []
    start = BlockStream._start

    def spy(stream: BlockStream, number: int) -> None:
        start(stream, number)
        copies.extend(weakref.ref(t) for t in stream._copies[number] if all(t is not c() for c in copies))
        alive = sum(c().nbytes for c in copies if c() is not None)  # type: ignore[union-attr]
        seen.append((number, alive))

    monkeypatch.setattr(BlockStream, "_start", spy)
    results(policy)
    one = sum(slot.host.nbytes for slot in policy.stream._slots[0])
    assert sum(p.nbytes for p in policy.blocks[0].parameters()) - one == sum(
        p.nbytes for n, p in policy.blocks[0].named_parameters() if "lora_" in n
    )
    assert max(alive for _, alive in seen) <= 3 * one  # the one that computes, its neighbours before and after
    fetched = [number for number, _ in seen[::2]]
    assert fetched == [*range(BLOCKS), *range(BLOCKS), *reversed(range(BLOCKS))]  # old, current, and its backward
    expected = [number for number, _ in seen[1::2]]
    assert expected == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 3, 2, 1, 0, 0]
    assert adapters == [p.data_ptr() for p in policy.adapters.parameters()]
    # Blocks that are not resident hold the host's own tensors.
    for number, slots in enumerate(policy.stream._slots):
        if number not in policy.stream.resident:
            assert all(slot.place[slot.name] is slot.host for slot in slots)
    assert len(policy.stream.resident) <= 2


def test_a_move_leaves_the_blocks_behind() -> None:
    transformer = random_pipeline("ltx-2").transformer
    with staying_on_the_host(transformer, True):
        transformer.to(torch.float64)
    assert transformer.proj_in.weight.dtype == torch.float64
    assert isinstance(transformer.transformer_blocks, nn.ModuleList)
    assert {p.dtype for p in transformer.transformer_blocks.parameters()} == {torch.float32}
    with staying_on_the_host(transformer, False):
        transformer.to(torch.float64)
    assert {p.dtype for p in transformer.parameters()} == {torch.float64}


def test_what_does_not_go_with_offloading_is_refused() -> None:
    with pytest.raises(ValueError, match="needs gradient_checkpointing"):
        ModelConfig(offload="blocks")
    with pytest.raises(ValueError, match="neither with compile nor with quantise: nf4"):
        ModelConfig(offload="blocks", gradient_checkpointing=True, quantise="nf4")
    policy = LTX2Policy(random_pipeline("ltx-2"), ModelConfig(vae_tiling=True), clip_defaults=SMALL)
    assert policy.pipeline.vae.use_tiling
