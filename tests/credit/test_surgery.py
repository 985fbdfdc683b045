from __future__ import annotations

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention
from peft import LoraConfig
from torch import nn

from omninft.credit.surgery import (
    DEFAULT_FRACTIONS,
    REFERENCE_SCHEDULE_48,
    GradientSurgery,
    SurgeryRange,
    scale_gradient,
    surgery_schedule,
)
from omninft.models.ltx2 import cross_sites
from omninft.models.protocol import CrossSite
from omninft.types import OmniNFTError

TARGETS = ["input", "projection"]
FRAMES, HEIGHT, WIDTH, AUDIO_TOKENS = 2, 2, 2, 5
# Modules of a block that the audio stream owns: the video loss reaches them through A2V alone.
AUDIO_STREAM = ("audio_attn1", "audio_attn2", "audio_ff", "video_to_audio_attn", "audio_scale_shift_table")


def tiny_model(num_layers: int = 2) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=3,
        audio_out_channels=3,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=num_layers,
        caption_channels=10,
        rope_type="split",
    )


def losses(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A video and an audio loss of one forward on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.9, 0.4])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    video, audio = model(
        hidden_states=normal(2, FRAMES * HEIGHT * WIDTH, 4),
        audio_hidden_states=normal(2, AUDIO_TOKENS, 3),
        encoder_hidden_states=normal(2, 3, 10),
        audio_encoder_hidden_states=normal(2, 3, 10),
        timestep=1000 * sigma,
        audio_timestep=1000 * sigma,
        sigma=1000 * sigma,
        audio_sigma=1000 * sigma,
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        audio_num_frames=AUDIO_TOKENS,
        use_cross_timestep=True,
        return_dict=False,
    )
    return (video * normal(*video.shape)).sum(), (audio * normal(*audio.shape)).sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every trainable parameter (zeros where the loss does not reach); cleared."""
    got = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return got


def gradients_of(model: nn.Module, which: str, surgery: GradientSurgery | None = None) -> dict[str, torch.Tensor]:
    if surgery is not None:
        surgery.enable()
    video, audio = losses(model)
    {"video": video, "audio": audio, "both": video + audio}[which].backward()
    if surgery is not None:
        surgery.disable()
    return gradients(model)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        limit = 2e-5 * max(expected[name].abs().max().item(), 1e-3)
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def detach_by_hand(model: nn.Module, schedule: list[float], attention: str, target: str) -> None:
    """Write the surgery into the forward by its formula, with detach; an independent implementation."""

    def cut(h: torch.Tensor, s: float) -> torch.Tensor:
        return s * h + (1 - s) * h.detach()

    for block, s in zip(model.transformer_blocks, schedule, strict=True):
        module = getattr(block, attention)
        if target == "input":

            def forward(hidden, encoder_hidden_states, original=module.forward, s=s, **kwargs):
                return original(hidden, encoder_hidden_states=cut(encoder_hidden_states, s), **kwargs)

            module.forward = forward
        else:
            for linear in (module.to_k, module.to_v):
                linear.forward = lambda x, original=linear.forward, s=s: cut(original(x), s)


def test_scale_gradient_is_the_identity_with_a_scaled_gradient():
    h = torch.tensor([1e-30, 1.1, -3.3e20, 0.0], requires_grad=True)
    out = scale_gradient(h, 0.1)
    assert torch.equal(out.view(torch.int32), h.detach().view(torch.int32))  # bits, not values
    out.backward(torch.tensor([1.0, 2.0, -3.0, 4.0]))
    torch.testing.assert_close(h.grad, 0.1 * torch.tensor([1.0, 2.0, -3.0, 4.0]))
    written_out = h.detach() * 0.9 + 0.1 * h.detach()
    assert not torch.equal(written_out, h.detach())  # the rounding that the Function avoids


@pytest.mark.parametrize("s", [0.0, 0.25, 1.0, 2.0])
def test_scale_gradient_by_finite_differences_downstream(s):
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    (scale_gradient(x.square(), s).sin()).sum().backward()
    step = 1e-6
    numeric = [
        ((v + step) ** 2 - (v - step) ** 2) / (2 * step) * torch.tensor(v**2).double().cos().item()
        for v in x.detach().tolist()
    ]
    torch.testing.assert_close(x.grad, s * torch.tensor(numeric, dtype=torch.float64), rtol=1e-8, atol=0)


def test_the_reference_schedule_and_its_fractions():
    by_blocks = [SurgeryRange(0, 1, 0.0), SurgeryRange(1, 11, 0.1), SurgeryRange(40, 48, 0.3)]
    expected = [0.0] + [0.1] * 10 + [1.0] * 29 + [0.3] * 8
    assert list(REFERENCE_SCHEDULE_48) == expected
    assert surgery_schedule(48, by_blocks) == expected
    assert surgery_schedule(48, DEFAULT_FRACTIONS) == expected


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (3, [0.0, 0.1, 0.3]),
        (4, [0.0, 0.1, 1.0, 0.3]),
        (8, [0.0, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 0.3]),
        (12, [0.0, 0.1, 0.1] + [1.0] * 7 + [0.3] * 2),
        (24, [0.0] + [0.1] * 5 + [1.0] * 14 + [0.3] * 4),  # 5.5 rounds to 6
    ],
)
def test_the_default_fractions_at_other_depths(num_blocks, expected):
    assert surgery_schedule(num_blocks, DEFAULT_FRACTIONS) == expected


def test_ranges_may_come_in_any_order_and_mix_units():
    spec = [SurgeryRange(0.5, 1, 0.3), SurgeryRange(0, 1, 0.0), SurgeryRange(2, 3, 0.5)]
    assert surgery_schedule(8, spec) == [0.0, 1.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.3]
    assert surgery_schedule(3, []) == [1.0, 1.0, 1.0]
    assert surgery_schedule(2, [SurgeryRange(0.0, 1.0, 0.5)]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("num_blocks", "spec", "message"),
    [
        (8, [SurgeryRange(0, 3, 0.1), SurgeryRange(2, 4, 0.2)], "overlap at block 2"),
        (8, [SurgeryRange(0.0, 0.5, 0.1), SurgeryRange(3, 4, 0.2)], "overlap at block 3"),
        (
            8,
            [SurgeryRange(0.0, 0.3, 0.1), SurgeryRange(0.29, 0.5, 0.2)],
            "overlap",
        ),  # not in blocks, but at other depths
        (8, [SurgeryRange(0, 9, 0.1)], "<= 8"),
        (8, [SurgeryRange(-1, 2, 0.1)], "block numbers with 0 <="),
        (8, [SurgeryRange(0.5, 1.5, 0.1)], "fractions of depth"),
        (8, [SurgeryRange(3, 3, 0.1)], "start < stop"),
        (8, [SurgeryRange(0, 3, -0.1)], "not negative"),
        (8, [SurgeryRange(0, 3, float("nan"))], "finite"),
        (2, DEFAULT_FRACTIONS, "2 blocks are too few"),
    ],
)
def test_bad_schedules_are_refused(num_blocks, spec, message):
    with pytest.raises(OmniNFTError, match=message):
        surgery_schedule(num_blocks, spec)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_values_stay_bit_equal(target):
    model = tiny_model()
    plain = losses(model)
    with GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 0.1], [0.3, 0.7], target):
        cut = losses(model)
    assert torch.equal(plain[0], cut[0])
    assert torch.equal(plain[1], cut[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("video_schedule", "audio_schedule"), [([0.0, 0.1, 0.3], None), ([0.2, 1.0, 1.7], [0.5, 0.0, 1.0])]
)
def test_gradients_match_the_formula_written_with_detach(target, video_schedule, audio_schedule):
    by_hand = tiny_model(3)
    detach_by_hand(by_hand, video_schedule, "audio_to_video_attn", target)
    if audio_schedule:
        detach_by_hand(by_hand, audio_schedule, "video_to_audio_attn", target)
    model = tiny_model(3)
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), video_schedule, audio_schedule, target)
    full = gradients_of(model, "both")
    cut = gradients_of(model, "both", surgery)
    assert_close(cut, gradients_of(by_hand, "both"))
    name = "transformer_blocks.0.audio_attn1.to_q.weight"
    assert not torch.allclose(cut[name], full[name], rtol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_zero_everywhere_keeps_the_video_loss_out_of_the_audio_stream(target):
    model = tiny_model()
    of_audio = [
        n for n, _ in model.named_parameters() if n.startswith("audio_") or any(f".{m}" in n for m in AUDIO_STREAM)
    ]
    full = gradients_of(model, "video")
    cut = gradients_of(
        model, "video", GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 0.0], target=target)
    )
    reached = [n for n in of_audio if full[n].abs().max() > 0]
    assert {n for n in reached if n.startswith("audio_proj_in")}
    assert any("0.video_to_audio_attn" in n for n in reached)
    assert all((cut[n] == 0).all() for n in of_audio)
    assert all((cut[n] != 0).any() for n in full if n not in of_audio and "attn1.to_v.weight" in n)


def test_what_crosses_once_scales_exactly_and_what_does_not_cross_stays_bit_equal():
    model = tiny_model()
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.5, 0.25])
    full_video, cut_video = gradients_of(model, "video"), gradients_of(model, "video", surgery)
    full_audio, cut_audio = gradients_of(model, "audio"), gradients_of(model, "audio", surgery)
    last = {n: n.removeprefix("transformer_blocks.1.") for n in full_video if n.startswith("transformer_blocks.1.")}
    # The last block's audio self- and text attention reach the video loss through its own A2V alone: times 0.25,
    # a power of two, so without rounding.
    for name in (n for n, m in last.items() if m.startswith(("audio_attn1", "audio_attn2"))):
        assert torch.equal(cut_video[name], 0.25 * full_video[name])
        if name.endswith("to_v.weight"):
            assert full_video[name].abs().max() > 0
    # Video stream of the last block, and the input target's own keys and values: no crossing on the way.
    direct = [n for n, m in last.items() if m.startswith(("attn", "ff", "audio_to_video_attn"))] + ["proj_out.weight"]
    assert all(torch.equal(cut_video[n], full_video[n]) and full_video[n].any() for n in direct if "to_v.weight" in n)
    assert all(torch.equal(cut_video[n], full_video[n]) for n in direct)
    # The audio loss crosses block 0's A2V (audio <- V2A <- video <- A2V <- audio) into block 0's audio layers only.
    video_side = [
        n for n in full_audio if n.startswith(("transformer_blocks.1.", "transformer_blocks.0.attn", "proj_in"))
    ]
    assert all(torch.equal(cut_audio[n], full_audio[n]) for n in video_side)
    assert full_audio["proj_in.weight"].any()
    indirect = "transformer_blocks.0.audio_attn1.to_v.weight"
    assert not torch.equal(cut_audio[indirect], full_audio[indirect])
    # In a model of one block the audio loss crosses nowhere.
    single = tiny_model(1)
    cut_single = GradientSurgery(cross_sites(single.transformer_blocks), [0.0])
    assert same(gradients_of(single, "audio"), gradients_of(single, "audio", cut_single))


def test_input_spares_keys_and_values_and_projection_does_not():
    model = tiny_model()
    full = gradients_of(model, "video")
    cut = {}
    for target in TARGETS:
        surgery = GradientSurgery(cross_sites(model.transformer_blocks), [1.0, 0.25], target=target)
        cut[target] = gradients_of(model, "video", surgery)
        surgery.close()
    for name in (f"transformer_blocks.1.audio_to_video_attn.to_{p}.weight" for p in "kv"):
        assert full[name].abs().max() > 0
        assert torch.equal(cut["input"][name], full[name])
        assert torch.equal(cut["projection"][name], 0.25 * full[name])
    stream = "transformer_blocks.1.audio_attn1.to_v.weight"
    assert torch.equal(cut["input"][stream], cut["projection"][stream])


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_under_lora(target):
    model = with_lora(tiny_model())
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    full = gradients_of(model, "video")
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [1.0, 0.25], target=target)
    cut = gradients_of(model, "video", surgery)
    surgery.check_fired()
    own = {"input": 1.0, "projection": 0.25}[target]
    checked = 0
    for name in (n for n in full if n.startswith("transformer_blocks.1.")):
        into_a2v = any(m in name for m in ("audio_attn1", "audio_attn2"))
        keys_values = any(m in name for m in ("audio_to_video_attn.to_k", "audio_to_video_attn.to_v"))
        factor = 0.25 if into_a2v else own if keys_values else 1.0
        assert torch.equal(cut[name], factor * full[name]), name
        checked += bool(full[name].any())
    assert checked >= 2 * (8 + 8 + 4)  # A and B of both streams' self- and text attention and of A2V


def test_an_adapter_added_after_projection_hooks_is_found_out():
    model = tiny_model()
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [1.0, 0.25], target="projection")
    with_lora(model)
    gradients_of(model, "video", surgery)
    with pytest.raises(OmniNFTError, match=r"replaced since: block 1 \(audio_to_video_attn.to_k\), block 1"):
        surgery.check_fired()
    other = tiny_model()
    on_input = GradientSurgery(cross_sites(other.transformer_blocks), [1.0, 0.25], target="input")
    gradients_of(with_lora(other), "video", on_input)
    on_input.check_fired()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lora", [False, True])
def test_under_activation_checkpointing(target, lora):
    model = with_lora(tiny_model(3)) if lora else tiny_model(3)
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 0.1, 0.3], [1.0, 0.5, 0.9], target)
    stored = gradients_of(model, "both", surgery)
    counts = surgery.counts
    surgery.reset()
    assert surgery.fired == set()
    model.enable_gradient_checkpointing()
    assert not same(stored, gradients_of(model, "both"))
    assert same(stored, gradients_of(model, "both", surgery))
    assert surgery.counts == counts == {0: 1, 1: 1, 2: 1}  # once, not again in the recomputation
    surgery.check_fired()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_two_backwards_of_one_forward_cut_the_video_loss_only(checkpointing, target):
    model = tiny_model(3)
    if checkpointing:
        model.enable_gradient_checkpointing()
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 0.1, 0.3], target=target)
    cut_video, full_audio = gradients_of(model, "video", surgery), gradients_of(model, "audio")
    cut_audio = gradients_of(model, "audio", surgery)
    video, audio = losses(model)
    with surgery:
        video.backward(retain_graph=True)
    assert same(gradients(model), cut_video)
    audio.backward()
    got = gradients(model)
    assert same(got, full_audio)
    assert not same(got, cut_audio)


def test_disabled_under_no_grad_and_closed():
    model = tiny_model()
    full = gradients_of(model, "both")
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 0.1], [0.0, 0.1])
    assert surgery.bound == 2
    assert same(gradients_of(model, "both"), full)
    with surgery, torch.no_grad():
        video, _ = losses(model)
    assert not video.requires_grad
    assert not surgery.active
    assert surgery.fired == set()
    assert not same(gradients_of(model, "both", surgery), full)
    surgery.close()
    assert surgery.bound == 0
    assert same(gradients_of(model, "both", surgery), full)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_bound_and_fired_tell_a_silent_surgery():
    model = tiny_model(3)
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 1.0, 0.3])
    assert surgery.bound == 2
    assert surgery.fired == set()
    assert surgery.counts == {0: 0, 2: 0}
    with surgery:
        video, _ = losses(model)
    video.backward()  # enabled in the forward alone: nothing was scaled
    with pytest.raises(OmniNFTError, match=r"names 2 blocks but did not fire at block 0 .*, block 2 "):
        surgery.check_fired()
    with surgery:
        losses(model)[0].backward()
    assert surgery.fired == {0, 2}
    surgery.check_fired()
    surgery.reset()
    model.transformer_blocks[2].audio_to_video_attn._forward_pre_hooks.clear()  # what a wrapper may do
    with surgery:
        losses(model)[0].backward()
    with pytest.raises(OmniNFTError, match=r"did not fire at block 2 \(audio_to_video_attn\):"):
        surgery.check_fired()


def test_nothing_to_scale_counts_as_fired():
    model = tiny_model()
    model.requires_grad_(False)
    model.transformer_blocks[1].ff.requires_grad_(True)
    model.transformer_blocks[0].attn1.requires_grad_(True)
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.0, 1.0])
    gradients_of(model, "video", surgery)  # block 0's audio carries no gradient
    surgery.check_fired()


class CrossOnly(nn.Module):
    """A2V alone, which a compiler is done with sooner than with a whole block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio_to_video_attn = LTX2Attention(8, heads=2, kv_heads=2, dim_head=4, cross_attention_dim=6)

    def forward(self, video: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        return self.audio_to_video_attn(video, encoder_hidden_states=audio)


@pytest.mark.parametrize("target", TARGETS)
def test_under_compile(target):
    video, audio = (torch.randn(1, 3, width, generator=torch.Generator().manual_seed(5)) for width in (8, 6))
    audio.requires_grad_()

    def gradient(block: nn.Module, surgery: GradientSurgery | None = None) -> torch.Tensor:
        loss = block(video, audio).square().sum()
        if surgery is not None:
            surgery.enable()
        (got,) = torch.autograd.grad(loss, audio)
        if surgery is not None:
            surgery.disable()
        return got

    torch.compiler.reset()
    block = torch.compile(CrossOnly(), backend="eager")
    full = gradient(block)
    # Hooks that come after the first compiled run may be left out of it: that must not go unnoticed.
    late = GradientSurgery([CrossSite(0, "a2v", block, "audio_to_video_attn")], [0.25], target=target)
    if torch.equal(gradient(block, late), full):
        with pytest.raises(OmniNFTError, match="did not fire at block 0"):
            late.check_fired()
    else:
        late.check_fired()
    late.close()
    torch.compiler.reset()
    surgery = GradientSurgery([CrossSite(0, "a2v", block, "audio_to_video_attn")], [0.25], target=target)
    # Switched on, off and on again: `active` is not frozen into the compiled graph.
    for active in (True, False, True):
        assert torch.equal(gradient(block, surgery if active else None), (0.25 if active else 1) * full)
    assert surgery.counts == {0: 2}
    assert full.any()
    torch.compiler.reset()


def test_constructor_refuses_what_it_cannot_bind():
    model = tiny_model()
    blocks = model.transformer_blocks
    with pytest.raises(OmniNFTError, match="a schedule of 1 factors for 2 blocks"):
        GradientSurgery(cross_sites(blocks), [0.5])
    with pytest.raises(OmniNFTError, match="v2a: a schedule of 3 factors"):
        GradientSurgery(cross_sites(blocks), [0.5, 0.5], [1.0, 1.0, 0.5])
    with pytest.raises(OmniNFTError, match=r"block 1: factor -0\.5"):
        GradientSurgery(cross_sites(blocks), [1.0, -0.5])
    with pytest.raises(OmniNFTError, match="surgery target is 'output'"):
        GradientSurgery(cross_sites(blocks), [1.0, 0.5], target="output")
    with pytest.raises(OmniNFTError, match=r"block 1 \(Linear\) has no module 'audio_to_video_attn'"):
        GradientSurgery(cross_sites([blocks[0], nn.Linear(1, 1)]), [1.0, 0.5])
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_a_call_without_audio_is_refused_and_a_positional_one_works():
    model = tiny_model(1)
    attention = model.transformer_blocks[0].audio_to_video_attn
    surgery = GradientSurgery(cross_sites(model.transformer_blocks), [0.25])
    video, audio = torch.randn(1, 4, 24), torch.randn(1, 3, 16, requires_grad=True)
    with surgery:
        attention(video, audio).sum().backward()
        cut = audio.grad.clone()
        audio.grad = None
        with pytest.raises(OmniNFTError, match="without encoder_hidden_states"):
            attention(video)
    attention(video, encoder_hidden_states=audio).sum().backward()
    assert torch.equal(cut, 0.25 * audio.grad)
    assert cut.any()


def test_two_surgeries_at_one_place_are_refused():
    model = tiny_model()
    first = GradientSurgery(cross_sites(model.transformer_blocks), [0.5, 0.5])
    with pytest.raises(OmniNFTError, match=r"block 0 \(audio_to_video_attn\): another gradient surgery acts there"):
        GradientSurgery(cross_sites(model.transformer_blocks), [0.5, 0.5])
    first.close()
    second = GradientSurgery(cross_sites(model.transformer_blocks), [0.5, 0.5])
    gradients_of(model, "video", second)
    second.check_fired()
    assert not any("surgery" in name for name in model.state_dict())
