"""How parts become one recipe: kinds, order, names, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from omninft.commands.keys import config_keys
from omninft.config import load_config, override_config
from omninft.recipes import PARTS, read_file, recipe_names
from omninft.runs.build import new_run_folder
from omninft.types import OmniNFTError


def flat(name: str, *without: str) -> dict[str, str]:
    return {k: v for k, v in load_config(name).fingerprint().items() if not k.startswith(without)}


def names_of(kind: str) -> list[str]:
    return [name for name in recipe_names() if read_file(name).kind == kind]


def test_the_shipped_parts() -> None:
    assert names_of("model") == ["ltx2", "ltx2.3", "ltx2.3-distilled", "ltx2.5"]
    assert names_of("machine") == ["1gpu", "24gb", "8gpu"]
    assert names_of("method") == [
        "arr", "diffusion_nft", "flow_grpo", "gdpo", "marble", "placebo", "routing", "routing_surgery",
    ]  # fmt: skip
    assert names_of("rewards") == ["commercial"]
    assert names_of("whole") == ["omninft", "paper"]
    assert all(read_file(name).summary.endswith((".", "weights")) for name in recipe_names())


@pytest.mark.parametrize("model", ["ltx2", "ltx2.3", "ltx2.5", "ltx2.3-distilled", "omninft", "paper"])
def test_every_combination_loads_under_its_own_name(model: str) -> None:
    for machine, method in itertools.product(names_of("machine"), names_of("method")):
        name = f"{model}+{method}+{machine}"
        config = load_config(name)
        assert (config.recipe, config.prompts.group_size) == (name, 8)
        assert config.model.path == load_config(model).model.path
        assert config.credit == load_config(f"{model}+{method}").credit


def test_names_keep_their_dot_and_folders_lose_the_plus(tmp_path: Path) -> None:
    assert load_config("ltx2.3").recipe == "ltx2.3"
    (tmp_path / "my.v2.yaml").write_text("base: ltx2.3+gdpo\n")
    assert load_config(str(tmp_path / "my.v2.yaml")).recipe == "my.v2"
    config = override_config(load_config("ltx2.3+gdpo+8gpu"), {"run.folder": str(tmp_path)})
    assert new_run_folder(config) == tmp_path / "ltx2.3-gdpo-8gpu"
    (tmp_path / "ltx2.3-gdpo-8gpu").mkdir()
    assert new_run_folder(config) == tmp_path / "ltx2.3-gdpo-8gpu-2"


def test_the_order_of_the_parts_does_not_count() -> None:
    made = [load_config("+".join(parts)) for parts in itertools.permutations(["ltx2.3", "gdpo", "24gb", "commercial"])]
    assert all(config == made[0] for config in made)
    assert made[0].recipe == "ltx2.3+commercial+gdpo+24gb"
    assert made[0].rewards == load_config("commercial").rewards


def test_a_method_alone_stands_on_the_bundled_model_and_brings_it_nowhere() -> None:
    assert load_config("gdpo").model_dump(exclude={"recipe"}) == load_config("omninft+gdpo").model_dump(
        exclude={"recipe"}
    )
    changed = {k for k, v in flat("ltx2+gdpo").items() if v != flat("ltx2")[k]}
    assert changed == {"credit.kind", "credit.surgery.enabled", "credit.regions.enabled"}
    assert load_config("commercial").model.path == "Lightricks/LTX-2"


def test_each_row_of_the_papers_ablation_is_one_part_away_from_the_next() -> None:
    rows = [flat(name) for name in ("ltx2+gdpo", "ltx2+routing", "ltx2+routing_surgery", "ltx2")]
    steps = [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(rows)]
    assert steps == [{"credit.kind"}, {"credit.surgery.enabled"}, {"credit.regions.enabled"}]
    assert flat("ltx2", "prompts") == flat("paper", "prompts")


def test_a_machine_gives_up_nothing_that_the_version_needs() -> None:
    config = load_config("ltx2.3-distilled+24gb")
    assert (config.sampling.num_steps, config.evaluation_sampling.num_steps) == (8, 8)
    assert (config.sampling.height, config.model.quantise, config.sampling.shift_tokens) == (256, "nf4", None)
    assert load_config("24gb+ltx2.3").sampling.num_steps == 10
    # A method of another loss takes the place of what the machine says about the loss.
    assert load_config("ltx2+24gb+flow_grpo").objective.kind == "flow_grpo"
    assert load_config("ltx2+24gb+gdpo").objective.reference_share == 0.25


def test_files_are_parts_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("prompts: {train: mine.jsonl}\nsampling: {height: 320}\n")
    config = load_config(f"{mine}+ltx2+24gb")
    assert (config.recipe, config.prompts.train, config.prompts.dev) == ("ltx2+24gb+mine", "mine.jsonl", "starter:dev")
    assert (config.sampling.height, config.sampling.width) == (320, 384)
    card = tmp_path / "card.yaml"
    card.write_text("part: machine\nbase: 24gb\nsampling: {batch_size: 1}\n")
    config = load_config(f"ltx2+{card}")
    assert (config.recipe, config.sampling.batch_size, config.sampling.height) == ("ltx2+card", 1, 256)
    plus = tmp_path / "a+b"
    plus.mkdir()
    (plus / "config.yaml").write_text("base: gdpo\n")
    assert load_config(str(plus / "config.yaml")).credit.kind == "gdpo"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ltx2+ltx2.3", r"ltx2 and ltx2\.3 each name a model; expected one of them"),
        ("omninft+ltx2", r"omninft and ltx2 each name a model"),
        ("ltx2+gdpo+marble", r"gdpo and marble each name the method"),
        ("ltx2+24gb+8gpu", r"24gb and 8gpu each name the machine"),
        ("24gb", r"recipe 24gb is for a machine; name the model too, e\.g\. ltx2\+24gb"),
        ("gdpo+24gb", r"recipe 24gb is for a machine"),
        ("ltx2+gpdo", r"unknown recipe 'gpdo', did you mean 'gdpo'\?"),
        ("ltx2+", r"unknown recipe ''"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: str, message: str) -> None:
    with pytest.raises(OmniNFTError, match=message):
        load_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "part: machine\ncredit: {kind: gdpo}",
            r"is a machine part and sets credit\.kind: that is for a method part; it",
        ),
        ("part: method\nmodel: {path: tiny}", r"is a method part and sets model\.path: that is for a model part; it"),
        ("part: method\nmodel: {quantise: nf4}", r"sets model\.quantise: that is for a machine part"),
        ("part: machine\nmodel: {path: tiny}", r"sets model\.path: that is for a model part"),
        ("part: machine\nprompts: {group_size: 4}", r"sets prompts\.group_size: that is for a model part"),
        ("part: model\nrewards: []", r"sets rewards: that is for a rewards part"),
        ("part: method\nseed: 3", r"sets seed: that is for no part, only for a whole recipe"),
        ("part: car\nseed: 3", r"part is 'car', expected one of model, rewards, method, machine, or no such key"),
        ("part: method\nbase: omninft", r"is a method part whose base omninft is not"),
    ],
)
def test_a_part_sets_keys_of_its_own_kind(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(OmniNFTError, match=message):
        load_config(f"ltx2+{tmp_path / 'mine.yaml'}" if "part: model" not in text else str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("kind", ["model", "method"])
def test_a_circle_of_parts_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"part: {kind}\nbase: {file}\n")
    with pytest.raises(OmniNFTError, match="in a circle"):
        load_config(str(file))


def test_every_key_of_a_part_is_a_key_of_the_config() -> None:
    known = [key.name for key in config_keys()]
    for prefixes in PARTS.values():
        for prefix in prefixes:
            assert any(name == prefix or name.startswith((f"{prefix}.", f"{prefix}[")) for name in known), prefix
