"""Every form a model is published in: exactly its tensors, on the right schedule, or a refusal that says why."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file, save_file

from omninft.config import GuidanceConfig, LoraConfig, ModelConfig, SamplingConfig
from omninft.models import loading, originals
from omninft.models.loading import load_pipeline, open_source, resolve_device
from omninft.models.ltx2 import LTX2Policy
from omninft.models.originals import load_component, read_headers
from omninft.models.versions import VERSIONS, Version, scheduler_of
from omninft.rollout.sampler import RolloutSampler
from omninft.types import OmniNFTError
from tests.models.published import as_published, published_pipeline, published_policy, save_originals
from tests.random_models import PROMPTS, groups

COMPONENTS = ("transformer", "connectors", "vae", "audio_vae", "vocoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline folder of each version, full weights, and "2.5 repository": distilled, the full ones beside."""
    root = tmp_path_factory.mktemp("folders")
    for version in VERSIONS:
        published_pipeline(version).save_pretrained(root / version)
    both = root / "2.5 repository"
    published_pipeline("2.5", "distilled").save_pretrained(both)
    published_pipeline("2.5", seed=50).transformer.save_pretrained(both / "transformer_full")
    return {path.name: path for path in root.iterdir()}


def assert_equal(one: LTX2Pipeline, other: LTX2Pipeline, parts: tuple[str, ...] = COMPONENTS) -> None:
    for name in parts:
        mine, expected = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert mine.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(mine[key], tensor), (name, key)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_is_loaded_as_it_was_saved(version: Version, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(ModelConfig(path=str(folders[version])))
    assert_equal(pipeline, published_pipeline(version))
    assert pipeline.transformer.config.perturbed_attn  # LTX-2's configuration says it cannot
    assert pipeline.scheduler.config.use_dynamic_shifting
    assert type(pipeline.text_encoder).__name__.startswith("Gemma4" if version == "2.5" else "Gemma3")
    assert not any(p.requires_grad for name in COMPONENTS for p in getattr(pipeline, name).parameters())
    assert not any(getattr(pipeline, name).training for name in (*COMPONENTS, "text_encoder"))


@pytest.mark.parametrize(("version", "split"), [("2", False), ("2.3", False), ("2.5", True)])
def test_original_files_hold_the_same_model(
    version: Version, split: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_published(monkeypatch)
    path = save_originals(published_pipeline(version), tmp_path, split)
    config = ModelConfig(path=str(path), weights="full", text_encoder=str(folders[version]))
    pipeline = load_pipeline(config)
    assert_equal(pipeline, published_pipeline(version))
    assert pipeline.transformer.config.perturbed_attn
    assert pipeline.scheduler.config == scheduler_of("full").config
    policy, folder = LTX2Policy(pipeline, config), LTX2Policy.load(ModelConfig(path=str(folders[version])))
    assert policy.version == version
    assert torch.equal(policy.encode(PROMPTS).video, folder.encode(PROMPTS).video)


@pytest.mark.parametrize("version", VERSIONS)
def test_spatio_temporal_guidance_runs_on_what_is_published(version: Version, folders: dict[str, Path]) -> None:
    policy = LTX2Policy.load(ModelConfig(path=str(folders[version]), lora=LoraConfig(rank=2, alpha=4)))
    size = {"num_frames": 9, "height": 32, "width": 32}
    stg = SamplingConfig(num_steps=2, video_guidance=GuidanceConfig(stg=1.0), stg_blocks=(1,), **size)
    policy.check_sampling(stg)
    guided = RolloutSampler(policy, stg).sample(groups(), 0, 0, "reference")
    plain = RolloutSampler(policy, SamplingConfig(num_steps=2, **size)).sample(groups(), 0, 0, "reference")
    assert (guided.latents.video - plain.latents.video).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_vocoder_stays_in_float32(dtype: str, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(ModelConfig(path=str(folders["2.3"]), dtype=dtype))
    for name in (*COMPONENTS, "text_encoder"):
        expected = torch.float32 if name == "vocoder" else getattr(torch, dtype)
        assert {p.dtype for p in getattr(pipeline, name).parameters()} == {expected}, name
    assert {t.dtype for t in pipeline.vocoder.buffers() if t.is_floating_point()} == {torch.float32}


class TestWeights:
    def test_the_full_ones_of_a_distilled_repository_get_their_schedule(self, folders: dict[str, Path]) -> None:
        path = str(folders["2.5 repository"])
        full = load_pipeline(ModelConfig(path=path, transformer="transformer_full", weights="full"))
        assert full.scheduler.config == scheduler_of("full").config
        assert_equal(full, published_pipeline("2.5", seed=50), ("transformer",))
        distilled = load_pipeline(ModelConfig(path=path, weights="distilled"))
        assert not distilled.scheduler.config.use_dynamic_shifting
        assert distilled.scheduler.config.shift_terminal is None
        assert open_source(ModelConfig(path=path)).weights == "distilled"

    def test_distilled_ones_in_a_recipe_for_full_ones(self, folders: dict[str, Path]) -> None:
        expected = r"made for full weights, .* has distilled ones, .*model\.transformer=transformer_full"
        with pytest.raises(OmniNFTError, match=expected):
            load_pipeline(ModelConfig(path=str(folders["2.5 repository"]), weights="full"))

    def test_full_ones_in_a_recipe_for_distilled_ones(self, folders: dict[str, Path]) -> None:
        expected = (
            "made for distilled weights, .* has full ones, which are sampled on another schedule; use recipe .*paper"
        )
        with pytest.raises(OmniNFTError, match=expected):
            load_pipeline(ModelConfig(path=str(folders["2"]), weights="distilled"))

    def test_original_files_do_not_say(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        as_published(monkeypatch)
        path = save_originals(published_pipeline("2.3"), tmp_path, split=False)
        with pytest.raises(OmniNFTError, match=r"say which ltx\.safetensors has, by model\.weights=full or"):
            load_pipeline(ModelConfig(path=str(path)))

    def test_the_bundled_model_goes_with_any_recipe(self) -> None:
        for weights in ("full", "distilled", None):
            assert open_source(ModelConfig(weights=weights)).version == "2"


class TestRefusals:
    @pytest.mark.parametrize("component", ["transformer", "connectors", "vocoder"])
    def test_names_that_do_not_fit_are_listed(
        self, component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_published(monkeypatch)
        file = save_originals(published_pipeline("2.3"), tmp_path, split=False)
        entries = read_headers([file])[component]
        gone = sorted(entries)[-1]
        other = {("added" if name == gone else name): entry for name, entry in entries.items()}
        with pytest.raises(OmniNFTError, match=rf"{component} does not fit LTX-2\.3: 1 missing: .*; 1 unknown: added"):
            load_component(component, "2.3", other, "cpu", torch.float32)

    def test_shapes_that_do_not_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        as_published(monkeypatch)
        file = save_originals(published_pipeline("2"), tmp_path, split=False)
        state = load_file(file)
        state["model.diffusion_model.proj_out.weight"] = torch.zeros(3, 24)
        save_file(state, file)
        with pytest.raises(OmniNFTError, match=r"1 tensors have another shape, .*proj_out\.weight has \[3, 24\]"):
            load_pipeline(ModelConfig(path=str(file), weights="full", text_cache=str(tmp_path)))

    def test_original_files_without_a_text_encoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        as_published(monkeypatch)
        path = save_originals(published_pipeline("2"), tmp_path, split=False)
        with pytest.raises(OmniNFTError, match="original files have no text encoder; name a pipeline folder"):
            load_pipeline(ModelConfig(path=str(path), weights="full"))

    def test_a_folder_of_neither_kind(self, tmp_path: Path) -> None:
        with pytest.raises(OmniNFTError, match=r"expected a model_index\.json .* or original \.safetensors files"):
            load_pipeline(ModelConfig(path=str(tmp_path)))
        save_file({"text": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(OmniNFTError, match=r"no LTX-2 transformer in 1 \.safetensors files"):
            load_pipeline(ModelConfig(path=str(tmp_path), weights="full"))

    def test_a_sub_folder_that_is_not_there(self, folders: dict[str, Path]) -> None:
        with pytest.raises(OmniNFTError, match="is no transformer; there are: transformer, transformer_full"):
            load_pipeline(ModelConfig(path=str(folders["2.5 repository"]), transformer="transformer_fulll"))

    def test_an_index_of_another_pipeline(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = shutil.copytree(folders["2"], tmp_path / "copy")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "NoSuchThing"]}))
        with pytest.raises(OmniNFTError, match=r"vae is diffusers\.NoSuchThing, expected a part of an LTX2Pipeline"):
            load_pipeline(ModelConfig(path=str(folder)))


def test_one_of_two_transformers_is_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_published(monkeypatch)
    pipeline = published_pipeline("2.5")
    folder = save_originals(pipeline, tmp_path, split=True)
    dev = folder / "diffusion_models" / "ltx-dev-transformer.safetensors"
    save_file({k: t + 1 for k, t in load_file(dev).items()}, dev.with_name("ltx-distilled-transformer.safetensors"))
    config = ModelConfig(path=str(folder), weights="full", text_cache=str(tmp_path / "texts"))
    with pytest.raises(OmniNFTError, match=r"both have transformer tensors, .* name one of them as model\.transformer"):
        load_pipeline(config)
    chosen = config.model_copy(update={"transformer": f"diffusion_models/{dev.name}"})
    assert_equal(load_pipeline(chosen), pipeline, ("transformer", "vae"))


def test_loading_holds_one_tensor_more_than_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_published(monkeypatch)
    entries = read_headers([save_originals(published_pipeline("2"), tmp_path, split=False)])["transformer"]
    made: list[torch.nn.Module] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    seen: list[tuple[int, int, int]] = []  # bytes in place, tensors beside them, bytes read before
    real_tensors, real_empty = originals._tensors, originals.empty

    def empty(*args: Any) -> torch.nn.Module:
        made.append(real_empty(*args))
        return made[0]

    def counted(*args: Any) -> Iterator[Any]:
        read = 0
        for entry, tensor in real_tensors(*args):
            seen.append((in_place(made[0]), len(alive), read))
            read += tensor.nbytes
            alive.add(tensor)
            yield entry, tensor

    monkeypatch.setattr(originals, "_tensors", counted)
    monkeypatch.setattr(originals, "empty", empty)
    module = load_component("transformer", "2", entries, "cpu", torch.float32)
    assert len(seen) == len(entries)
    assert seen[0] == (0, 0, 0)
    assert all(placed == read and beside <= 1 for placed, beside, read in seen)
    assert in_place(module) == sum(p.nbytes for p in module.parameters())


def in_place(module: torch.nn.Module) -> int:
    """Bytes of weights that are in memory."""
    return sum(p.nbytes for p in module.parameters() if p.device.type != "meta")


def test_parts_that_are_not_used_are_not_loaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = loading._load_part

    def noted(source: Any, name: str, device: Any, dtype: Any, folder: str | None = None) -> Any:
        loaded.append(name)
        return real(source, name, device, dtype, folder)

    monkeypatch.setattr(loading, "_load_part", noted)
    pipeline = load_pipeline(ModelConfig(path=str(folders["2"]), text_cache="unused"))
    assert sorted(loaded) == ["audio_vae", "transformer", "vae", "vocoder"]
    assert pipeline.text_encoder is None
    assert pipeline.connectors is None


def test_auto_is_the_device_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:3")
    assert resolve_device("cuda") == torch.device("cuda:3")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")


class TestFirstFrameMark:
    """LTX-2.5 adds a learned vector to tokens that stand for one frame."""

    def velocity(self, policy: LTX2Policy) -> torch.Tensor:
        sampler = RolloutSampler(policy, SamplingConfig(num_steps=2))
        noise = sampler.initial_noise([("a", 0), ("b", 0)], 0, 0)
        sigma, context = torch.full((2,), 0.9), policy.encode(PROMPTS)
        return policy.velocity(noise, sigma, context, sampler.geometry, "reference").video

    def test_marks_the_first_latent_frame(self) -> None:
        policy = published_policy("2.5")
        seen: list[torch.Tensor] = []
        policy.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["video_keyframes_mask"]), with_kwargs=True
        )
        marked = self.velocity(policy)
        g = policy.geometry(SamplingConfig())
        assert seen[0].shape == (1, g.video_tokens, 1)
        assert seen[0].flatten().tolist() == [1.0] * 4 + [0.0] * 4  # 2 x 2 tokens of the first of 2 latent frames
        unmarked = self.velocity(published_policy("2.5", mark_first_frame=False))
        assert (marked - unmarked).abs().max() > 1e-3
        # The same as adding the table's vector after the projection in, by hand.
        table = policy.pipeline.transformer.keyframes_abs_pos_embedding
        by_hand = published_policy("2.5", mark_first_frame=False)

        def add(module: torch.nn.Module, args: Any, made: torch.Tensor) -> torch.Tensor:
            return torch.cat([made[:, :4] + table, made[:, 4:]], dim=1)

        by_hand.pipeline.transformer.proj_in.register_forward_hook(add)
        torch.testing.assert_close(self.velocity(by_hand), marked, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("version", ["2", "2.3"])
    def test_other_versions_are_given_none(self, version: Version) -> None:
        policy = published_policy(version)
        geometry = policy.geometry(SamplingConfig())
        assert policy._keyframes(geometry, torch.zeros(1)) is None


def test_the_published_schedules_at_the_recipes_shift() -> None:
    """METHOD's noise levels of full weights at 4096 tokens; distilled weights are not shifted."""
    policy = published_policy("2")
    sampling = SamplingConfig(num_steps=20, shift_tokens=4096)
    sigmas = policy.sigmas(20, policy.geometry(sampling), 4096)
    expected = [1.0, 0.9915, 0.9821, 0.9718, 0.9605, 0.9478, 0.9337, 0.9178]
    torch.testing.assert_close(sigmas[:8], torch.tensor(expected), atol=6e-5, rtol=0)
    assert abs(float(sigmas[-2]) - 0.1) < 1e-6
    policy.pipeline.scheduler = scheduler_of("distilled")
    distilled = policy.sigmas(4, policy.geometry(sampling), 4096)
    torch.testing.assert_close(distilled, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    policy.pipeline.scheduler = scheduler_of("full")
    with pytest.raises(OmniNFTError, match="num_steps: found 1, expected at least 2"):
        policy.sigmas(1, policy.geometry(sampling), 4096)


@pytest.mark.parametrize("version", VERSIONS)
def test_other_sizes_and_lengths(version: Version, folders: dict[str, Path]) -> None:
    """A LoRA goes with any clip: it is of no size."""
    policy = LTX2Policy.load(ModelConfig(path=str(folders[version]), lora=LoraConfig(rank=2, alpha=4)))
    for frames, height, width in ((9, 64, 96), (17, 96, 64)):
        sampling = SamplingConfig(num_steps=2, num_frames=frames, height=height, width=width, frame_rate=24.0)
        sampler = RolloutSampler(policy, sampling)
        rollout = sampler.sample(groups()[:1], 0, 0, "current")
        video, audio = policy.decode(rollout.latents, sampler.geometry)
        assert video.shape == (1, frames, height, width, 3)
        assert audio.shape[:2] == (1, 2)
        assert abs(audio.shape[2] / sampler.geometry.sample_rate - frames / 24) < 0.1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "[]"),
        ("model_index.json", '{"vae": 3}'),
        ("transformer/config.json", "{"),
        ("transformer/config.json", '{"num_layers": "many"}'),
        ("vae/config.json", "[3]"),
        ("scheduler/scheduler_config.json", "7"),
        ("transformer/diffusion_pytorch_model.safetensors", "cut"),
    ],
)
def test_a_damaged_folder_is_one_line(file: str, text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["2"], tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(OmniNFTError, match="model") as raised:
        load_pipeline(ModelConfig(path=str(folder)))
    assert "\n" not in str(raised.value)
