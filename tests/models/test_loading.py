"""Folders of models that are not whole: one line that says what could not be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omninft.config import ModelConfig
from omninft.models.loading import load_pipeline, model_path, read_clip_defaults, resolve_device
from omninft.types import OmniNFTError


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "an index that is a list": lambda folder: (folder / "model_index.json").write_text("[]"),
    "an index of other parts": lambda folder: (folder / "model_index.json").write_text(
        '{"_class_name": "X", "vae": 3}'
    ),
    "no transformer": lambda folder: shutil.rmtree(folder / "transformer"),
    "no weights": lambda folder: next((folder / "transformer").glob("*.safetensors")).unlink(),
    "weights that are cut": lambda folder: cut(next((folder / "transformer").glob("*.safetensors"))),
    "a config that is no JSON": lambda folder: (folder / "transformer" / "config.json").write_text("{"),
    "a config of other types": lambda folder: (folder / "transformer" / "config.json").write_text(
        '{"_class_name": "LTX2VideoTransformer3DModel", "num_layers": "many"}'
    ),
    "a config that is a list": lambda folder: (folder / "vae" / "config.json").write_text("[3]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path("tiny"), folder)
    DAMAGE[what](folder)
    with pytest.raises(OmniNFTError, match="model") as raised:
        load_pipeline(ModelConfig(path=str(folder), device="cpu"))
    assert "\n" not in str(raised.value)


def test_sizes_and_devices_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "clip_defaults.json").write_text('{"num_frames": "many", "height": 1, "width": 1, "frame_rate": 1}')
    with pytest.raises(OmniNFTError, match=r"clip_defaults\.json: not the sizes.*num_frames: .*found 'many'"):
        read_clip_defaults(str(tmp_path))
    with pytest.raises(OmniNFTError, match=r"model\.device is 'gpu9000', expected auto, cpu"):
        resolve_device("gpu9000")
