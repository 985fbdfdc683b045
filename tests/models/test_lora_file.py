"""One adapter in every naming: it binds whole, at its strength, or what does not is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omninft.config import LoraConfig, ModelConfig
from omninft.evaluation.sampling import load_policy
from omninft.models.adapters import DEFAULT_TARGETS
from omninft.models.loading import model_path
from omninft.models.lora_file import bind, read_lora, renamed, targets_of
from omninft.models.ltx2 import LTX2Policy
from omninft.types import OmniNFTError

RANK, ALPHA = 4, 6.0
BLOCKS = 8  # of the bundled model
NAMES = [f"transformer_blocks.{i}.{t}" for i in range(BLOCKS) for t in DEFAULT_TARGETS]
BESIDE = ["proj_in", "time_embed.linear", "av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_1"]


def shapes() -> dict[str, tuple[int, int]]:
    """Out and in features of the bundled model's linears."""
    from safetensors import safe_open

    file = Path(model_path("tiny")) / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, framework="pt") as handle:
        found = {k.removesuffix(".weight"): handle.get_slice(k).get_shape() for k in handle.keys()}  # noqa: SIM118
    return {k: tuple(s) for k, s in found.items() if len(s) == 2}


def random_lora(names: list[str] = NAMES, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    size = shapes()
    return {n: (torch.randn(rank, size[n][1]), torch.randn(size[n][0], rank) * 0.1) for n in names}


Lora = dict[str, tuple[Tensor, Tensor]]


def pairs(lora: Lora, name: Callable[[str], str], down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    return {f"{name(n)}.{part}.weight": t for n, ab in lora.items() for part, t in zip((down, up), ab, strict=True)}


def alphas(lora: Lora, name: Callable[[str], str]) -> dict[str, Tensor]:
    return {f"{name(n)}.alpha": torch.tensor(ALPHA) for n in lora}


def _diffusers(lora: Lora, folder: Path) -> None:
    about = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.target_modules": ["to_q"]}
    metadata = {"lora_adapter_metadata": json.dumps(about)}
    save_file(pairs(lora, lambda n: f"transformer.{n}"), folder / "lora.safetensors", metadata)


def _comfyui(lora: Lora, folder: Path) -> None:
    def name(n: str) -> str:
        return f"diffusion_model.{renamed(n)}"

    save_file(pairs(lora, name, "lora_down", "lora_up") | alphas(lora, name), folder / "lora.safetensors")


def _peft(lora: Lora, folder: Path) -> None:
    save_file(pairs(lora, lambda n: f"base_model.model.{n}"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}}))


def _bare(lora: Lora, folder: Path) -> None:
    scaled = {n: (a, b * ALPHA / RANK) for n, (a, b) in lora.items()}  # ltx-core knows no alpha
    save_file(pairs(scaled, renamed), folder / "lora.safetensors")


def _kohya(lora: Lora, folder: Path) -> None:
    def name(n: str) -> str:
        return f"lora_unet_{renamed(n).replace('.', '_')}"

    save_file(pairs(lora, name, "lora_down", "lora_up") | alphas(lora, name), folder / "lora.safetensors")


def _kohya_metadata(lora: Lora, folder: Path) -> None:
    file = folder / "lora.safetensors"
    save_file(pairs(lora, lambda n: f"diffusion_model.{renamed(n)}"), file, {"ss_network_alpha": str(ALPHA)})


FORMS = {
    "diffusers": _diffusers,
    "ComfyUI": _comfyui,
    "PEFT": _peft,
    "bare": _bare,
    "kohya": _kohya,
    "kohya's metadata": _kohya_metadata,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_naming_is_the_same_adapter(form: str, tmp_path: Path) -> None:
    lora = random_lora([*NAMES, *BESIDE])
    FORMS[form](lora, tmp_path)
    state, config = read_lora(tmp_path)
    assert {key.rpartition(".")[0] for key in state} == {*NAMES, *BESIDE}
    assert config.rank == RANK
    assert config.alpha == (RANK if form == "bare" else ALPHA)
    for name, (a, b) in lora.items():
        made = config.alpha / config.rank * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(made, ALPHA / RANK * b @ a, atol=1e-6, rtol=1e-6)


class TestAlpha:
    def test_original_names_without_it_mean_rank(self, tmp_path: Path) -> None:
        save_file(pairs(random_lora(), lambda n: f"diffusion_model.{n}"), tmp_path / "lora.safetensors")
        assert read_lora(tmp_path)[1].alpha == RANK

    @pytest.mark.parametrize("prefix", ["transformer.", "base_model.model."])
    def test_diffusers_names_without_it_are_refused_unless_it_is_given(self, prefix: str, tmp_path: Path) -> None:
        save_file(pairs(random_lora(), lambda n: prefix + n), tmp_path / "lora.safetensors")
        with pytest.raises(OmniNFTError, match="no word of alpha; without it its strength would be a guess"):
            read_lora(tmp_path)
        assert read_lora(tmp_path, alpha=3.0)[1].alpha == 3.0

    def test_modules_of_their_own_are_folded(self, tmp_path: Path) -> None:
        lora = random_lora(NAMES[:3])
        odd = {f"{NAMES[0]}.alpha": torch.tensor(3.0)}
        file = tmp_path / "lora.safetensors"
        save_file(pairs(lora, str) | alphas(lora, str) | odd, file)
        state, config = read_lora(file)
        assert config.alpha == ALPHA
        torch.testing.assert_close(state[f"{NAMES[0]}.lora_B"], lora[NAMES[0]][1] * 3.0 / ALPHA)
        assert torch.equal(state[f"{NAMES[1]}.lora_B"], lora[NAMES[1]][1])

    def test_scaled_by_the_root_of_the_rank(self, tmp_path: Path) -> None:
        _peft(random_lora(NAMES[:1]), tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3.0, "use_rslora": True}))
        assert read_lora(tmp_path)[1].alpha == 3.0 * RANK / 2


class TestRefusals:
    def test_ranks_that_differ(self, tmp_path: Path) -> None:
        lora = random_lora(NAMES[:3]) | random_lora(NAMES[3:4], rank=2)
        save_file(pairs(lora, str), tmp_path / "lora.safetensors")
        with pytest.raises(OmniNFTError, match=r"ranks 4 \(3 modules\), 2 \(1 modules\); expected one rank"):
            read_lora(tmp_path)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"a.dora_scale": torch.ones(2)}, r"1 things are no LoRA's of linears: a\.dora_scale"),
            ({"a.b.lora_A.weight": torch.ones(2, 2)}, r"a\.b \(one matrix\)"),
            (
                {"a.b.lora_A.weight": torch.ones(2, 2, 1), "a.b.lora_B.weight": torch.ones(2, 2, 1)},
                r"a\.b \(of a convolution\)",
            ),
        ],
    )
    def test_what_is_no_lora(self, more: dict[str, Tensor], message: str, tmp_path: Path) -> None:
        save_file(pairs(random_lora(NAMES[:1]), str) | more, tmp_path / "lora.safetensors")
        with pytest.raises(OmniNFTError, match=message):
            read_lora(tmp_path)

    def test_other_kinds_of_adapter(self, tmp_path: Path) -> None:
        _peft(random_lora(NAMES[:1]), tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3.0, "use_dora": True}))
        with pytest.raises(OmniNFTError, match="use_dora: True is another kind of adapter"):
            read_lora(tmp_path)
        (tmp_path / "adapter_config.json").write_text("[]")
        with pytest.raises(OmniNFTError, match="its description is no JSON of a LoRA"):
            read_lora(tmp_path)

    def test_two_files_in_a_folder(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            save_file(pairs(random_lora(NAMES[:1]), str), tmp_path / f"{name}.safetensors")
        with pytest.raises(OmniNFTError, match=r"found 2 \.safetensors files, expected one LoRA"):
            read_lora(tmp_path)


def test_binding_all_nothing_and_a_part() -> None:
    mine = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 2), "b.lora_A": torch.ones(2, 3)}
    mine["b.lora_B"] = torch.ones(4, 2)
    whole = bind({"a.lora_A": torch.zeros(2, 3), "a.lora_B": torch.full((4, 2), 7.0)}, mine, "file")
    assert whole["a.lora_B"].unique().tolist() == [7.0]
    assert whole["b.lora_A"].unique().tolist() == [1.0]  # not of the file: the run's own draw, which adds nothing yet
    assert whole["b.lora_B"].unique().tolist() == [0.0]
    foreign = {f"{n}.lora_A": torch.zeros(2, 3) for n in "cdef"}
    with pytest.raises(
        OmniNFTError, match=r"^file: 4 of 4 tensors have no place .*: c\.lora_A \[2, 3\], d.*, e.*, \.\.\."
    ):
        bind(foreign, mine, "file", partial=True)
    part = foreign | {"a.lora_A": torch.zeros(2, 3), "b.lora_A": torch.zeros(5, 3)}
    with pytest.raises(OmniNFTError, match=r"5 of 6 .* b\.lora_A \[5, 3\] \(here \[2, 3\]\), .*init_partial=true"):
        bind(part, mine, "file")
    assert bind(part, mine, "file", partial=True)["a.lora_A"].sum() == 0


def test_targets_are_as_short_as_they_can_be() -> None:
    assert targets_of(NAMES) == DEFAULT_TARGETS
    assert targets_of(["transformer_blocks.0.a.b", "transformer_blocks.1.a.b"]) == ("a.b",)
    assert targets_of(["transformer_blocks.0.a", "transformer_blocks.1.b"]) == (
        "transformer_blocks.0.a",
        "transformer_blocks.1.b",
    )
    assert targets_of(["proj_in", "transformer_blocks.0.a"]) == ("proj_in", "transformer_blocks.0.a")


def started(lora: LoraConfig) -> LTX2Policy:
    return LTX2Policy.load(ModelConfig(lora=lora))


class TestStart:
    def test_current_and_old_start_from_it_and_the_reference_does_not(self, tmp_path: Path) -> None:
        lora = random_lora()
        _comfyui(lora, tmp_path)
        policy = started(LoraConfig(rank=RANK, alpha=8, init=str(tmp_path)))
        for adapter in ("current", "old"):
            state = policy.adapters.state(adapter)
            for name, (a, b) in lora.items():
                # Alpha is the recipe's; B makes up for it.
                made = 8 / RANK * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
                torch.testing.assert_close(made, ALPHA / RANK * b @ a, atol=1e-5, rtol=1e-5)
        layer = policy.adapters.layers[0]
        x = torch.randn(2, layer.in_features)
        with policy.adapters.using("reference"):
            assert torch.equal(layer(x), layer.base_layer(x))

    def test_another_rank_names_the_right_one(self, tmp_path: Path) -> None:
        _peft(random_lora(NAMES[:1]), tmp_path)
        with pytest.raises(OmniNFTError, match=r"has rank 4, not 32; set model\.lora\.rank=4"):
            started(LoraConfig(init=str(tmp_path)))

    def test_of_a_deeper_model_is_refused_unless_a_part_will_do(self, tmp_path: Path) -> None:
        lora = random_lora() | {f"transformer_blocks.{i}.attn1.to_q": random_lora(NAMES[:1])[NAMES[0]] for i in (8, 9)}
        _comfyui(lora, tmp_path)
        config = LoraConfig(rank=RANK, alpha=ALPHA, init=str(tmp_path))
        with pytest.raises(OmniNFTError, match=r"4 of 452 tensors have no place .*transformer_blocks\.8\.attn1\.to_q"):
            started(config)
        policy = started(config.model_copy(update={"init_partial": True}))
        assert torch.equal(policy.adapters.state("current")[f"{NAMES[5]}.lora_B"], lora[NAMES[5]][1])


@pytest.mark.parametrize("strength", [0.5, 0.0])
def test_strength_scales_what_is_added(strength: float, tmp_path: Path) -> None:
    lora = random_lora(NAMES[:2])
    _kohya(lora, tmp_path)
    policy, adapter = load_policy("tiny", tmp_path, strength=strength)
    assert adapter == "current"
    state, config = policy.adapters.state("current"), policy.adapters.config
    for name, (a, b) in lora.items():
        made = config.alpha / config.rank * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(made, strength * ALPHA / RANK * b @ a, atol=1e-6, rtol=1e-6)


def test_a_lora_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    other = {f"blocks.{i}.qkv": (torch.zeros(RANK, 5), torch.zeros(5, RANK)) for i in range(40)}
    _bare(other, tmp_path)
    with pytest.raises(
        OmniNFTError, match=r"80 of 80 tensors have no place in this model's adapters: blocks\.0\.qkv.*"
    ):
        load_policy("tiny", tmp_path)
