"""Compiled blocks: one graph for all of them, with gradients that surgery cuts as in eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omninft.config import LoraConfig, ModelConfig, SamplingConfig
from omninft.credit.surgery import GradientSurgery
from omninft.models.compiling import RECOMPILE_LIMIT, compile_blocks
from omninft.models.ltx2 import LTX2Policy
from omninft.types import Latents, OmniNFTError, Recording
from tests.random_models import PROMPTS, SMALL, random_pipeline

BLOCKS = 3


def bfloat16_policy() -> LTX2Policy:
    """In bfloat16 nothing is folded, so that eager and compiled code take the same products."""
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=4), gradient_checkpointing=True)
    policy = LTX2Policy(random_pipeline("ltx-2", BLOCKS).to(torch.bfloat16), config, clip_defaults=SMALL)
    policy.transformer.train()
    torch.manual_seed(1)
    for key, tensor in policy.adapters.state("current").items():
        if key.endswith("lora_B"):
            tensor.normal_(0, 0.1)
    return policy


def velocity(policy: LTX2Policy, adapter: Any) -> Latents:
    g = policy.geometry(SamplingConfig())
    generator = torch.Generator().manual_seed(2)
    noisy = Latents(
        torch.randn(2, g.video_tokens, 16, generator=generator), torch.randn(2, g.audio_tokens, 16, generator=generator)
    )
    return policy.velocity(noisy, torch.tensor([0.5, 0.8]), policy.encode(PROMPTS), g, adapter)


def gradients(policy: LTX2Policy, surgery: GradientSurgery | None) -> list[Tensor]:
    """Of a loss of both streams, after predictions of the other two policies."""
    with torch.no_grad():
        constant = velocity(policy, "old").video - velocity(policy, "reference").video
    with policy.adapters.using("current"):
        made = velocity(policy, "current")
        loss = (made.video - constant).square().mean() + made.audio.square().mean()
        if surgery is None:
            loss.backward()
        else:
            with surgery:
                loss.backward()
    found = [p.grad for p in policy.adapters.parameters()]
    policy.transformer.zero_grad(set_to_none=True)
    return [g for g in found if g is not None]


def test_one_graph_serves_all_blocks_and_gradients_are_those_of_eager_code() -> None:
    policy = bfloat16_policy()
    surgery = GradientSurgery(policy.sites, [0.0, 0.1, 0.5], [1.0, 0.5, 0.9])
    recorders = [policy.recorder(Recording("v2a_columns")), policy.recorder(Recording("responses"))]
    cut, full = gradients(policy, surgery), gradients(policy, None)
    assert len(full) == 2 * 28 * BLOCKS
    assert any(not torch.equal(a, b) for a, b in zip(cut, full, strict=True))
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    policy.config = policy.config.model_copy(update={"compile": True})
    policy.transformer.compile_repeated_blocks(backend=count)  # type: ignore[operator]
    for expected, cutting in ((cut, surgery), (full, None), (cut, surgery)):
        for a, b in zip(gradients(policy, cutting), expected, strict=True):
            assert torch.equal(a, b)
    # Old and reference without gradients, current with; the first block apart, whose input carries no gradient.
    assert len(graphs) == 4
    assert not torch._dynamo.utils.counters["graph_break"]
    surgery.check_fired()
    for recorder in recorders:
        recorder.recording = True
    with torch.no_grad():
        velocity(policy, "old")
    found = [recorder.collect() for recorder in recorders]
    assert found[1]["a2v_responses"].shape == (2, BLOCKS, 4 * 12)
    assert len(graphs) == 4  # recorded steps run as they are written
    torch.compiler.reset()


def test_what_cannot_be_compiled_is_said() -> None:
    with pytest.raises(OmniNFTError, match="Linear names no repeated blocks"):
        compile_blocks(torch.nn.Linear(1, 1))
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT
