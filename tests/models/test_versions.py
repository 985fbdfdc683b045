"""The published configurations, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omninft.config import GuidanceConfig, SamplingConfig
from omninft.models.versions import VERSIONS, Version, published, scheduler_of, version_of, weights_of
from omninft.types import OmniNFTError
from tests.models.published import SMALL, published_policy, small_configs

DATA = Path(__file__).parents[3] / "shared" / "data" / "ltx2_configs.json"


def test_what_sets_the_versions_apart() -> None:
    two, three, five = (published(v)["transformer"] for v in VERSIONS)
    assert [c["perturbed_attn"] for c in (two, three, five)] == [False, True, True]
    assert [c["use_prompt_embeddings"] for c in (two, three, five)] == [True, False, False]
    assert all(five[key] == value for key, value in three.items())
    assert {k: v for k, v in five.items() if k not in three} == {
        "ff_bias": False,
        "use_keyframes_abs_pos_embedding": True,
    }
    assert [published(v)["vocoder"]["output_sampling_rate"] for v in VERSIONS] == [24_000, 48_000, 48_000]
    assert [published(v)["connectors"]["video_connector_num_learnable_registers"] for v in VERSIONS] == [128] * 3


@pytest.mark.skipif(not DATA.is_file(), reason="needs the collected facts, which are no part of the project")
@pytest.mark.parametrize("version", VERSIONS)
def test_configurations_are_the_collected_ones(version: Version) -> None:
    facts = json.loads(DATA.read_text())["configs"]
    for name, config in published(version).items():
        known = facts["video_vae" if name == "vae" else name]["2.0" if version == "2" else version]
        # Two values of LTX-2.5 depend on its text encoder, and one of the autoencoders' on the file.
        for key, value in known.items():
            assert config[key] == value or str(value).startswith("<"), (name, key)
        assert config.keys() == known.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_small_models_have_every_published_flag(version: Version) -> None:
    for name, config in small_configs(version).items():
        for key, value in published(version)[name].items():
            if isinstance(value, bool | str | type(None)):
                assert config[key] == value, (name, key)
        assert config.keys() >= SMALL[name].keys()
    assert version_of(small_configs(version)["transformer"]) == version


def test_schedulers_are_told_apart() -> None:
    full, distilled = scheduler_of("full"), scheduler_of("distilled")
    assert (full.config.use_dynamic_shifting, full.config.base_shift, full.config.max_shift) == (True, 0.95, 2.05)
    assert (full.config.base_image_seq_len, full.config.max_image_seq_len) == (1024, 4096)
    assert (full.config.shift_terminal, distilled.config.shift_terminal) == (0.1, None)
    assert not distilled.config.use_dynamic_shifting
    assert (weights_of(full.config), weights_of(distilled.config)) == ("full", "distilled")
    assert weights_of({"use_dynamic_shifting": False, "base_shift": 0.5}) is None


@pytest.mark.parametrize(("version", "crf"), [("2", 33), ("2.3", 33), ("2.5", 18)])
def test_first_frames_are_compressed_as_in_training(version: Version, crf: int) -> None:
    policy = published_policy(version)
    assert policy.first_frame_crf == crf
    policy.pipeline.register_modules(text_encoder=None)
    assert policy.first_frame_crf == crf


@pytest.mark.parametrize(("version", "block"), [("2", 29), ("2.3", 28), ("2.5", 28)])
def test_a_recipe_without_blocks_perturbs_the_versions_own(
    version: Version, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingConfig(video_guidance=GuidanceConfig(stg=1.0))
    policy = published_policy(version)
    with pytest.raises(OmniNFTError, match=f"names no block, and that of LTX-{version}, {block}, is none of this"):
        policy.check_sampling(sampling)
    monkeypatch.setattr("omninft.models.ltx2.STG_BLOCK", {version: 1})
    policy.pipeline.transformer.register_to_config(perturbed_attn=True)
    policy.check_sampling(sampling)
    assert policy._stg_blocks(()) == [1]
    assert policy._stg_blocks((0, 1)) == [0, 1]
