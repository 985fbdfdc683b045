"""What of a hub repository a model is loaded from, and whether it is on this machine.

Loading never downloads: `local_pipeline` finds the pipeline in the hub's cache, or says what `omninft fetch` gets.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from omninft.config import ModelConfig
from omninft.hub import Need, describe_missing
from omninft.types import OmniNFTError

INDEX = "model_index.json"
# Of an LTX2Pipeline: folder, and what lies there.
COMPONENTS = {
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "connectors": "connectors",
    "vae": "video autoencoder",
    "audio_vae": "audio autoencoder",
    "vocoder": "vocoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}
TEXT_PARTS = ("text_encoder", "tokenizer")
_NO_WEIGHTS = ("tokenizer", "scheduler", "processor")


@dataclass(frozen=True)
class Release:
    """A published repository."""

    licence: str
    gated: bool
    megabytes: dict[str, int]  # of each component with weights, in bfloat16


_LTX2 = {"transformer": 37_750, "text_encoder": 24_400, "connectors": 2_860, "vae": 2_440, "audio_vae": 110}
_LTX23 = {"transformer": 37_980, "text_encoder": 24_400, "connectors": 6_340, "vae": 1_450, "audio_vae": 110}
_LICENCE = "LTX-2.x Community License"
# Sizes as counted on the meta device from the published configurations, two bytes a parameter (2026-11); LTX-2.5's text
# encoder and connectors are those of LTX-2.3, about. Gated: as the repositories' pages said then. The hub's own
# numbers take their place when it can be asked.
RELEASES = {
    "Lightricks/LTX-2": Release("LTX-2 Community License", False, _LTX2 | {"vocoder": 112}),
    "diffusers/LTX-2.3-Diffusers": Release(_LICENCE, False, _LTX23 | {"vocoder": 258}),
    "diffusers/LTX-2.3-Distilled-Diffusers": Release(_LICENCE, False, _LTX23 | {"vocoder": 258}),
    "Lightricks/LTX-2.5-Diffusers": Release(_LICENCE, True, _LTX23 | {"vocoder": 258}),
}
_UNKNOWN = Release("see its page", False, {})
_SMALL = 35  # MB of a tokenizer


def model_needs(config: ModelConfig) -> tuple[Need, ...]:
    """What a hub model is loaded from, a component each; nothing of the bundled model or a folder."""
    if config.text_encoder is None:
        return _repository_needs(config)
    apart = ModelConfig(path=config.text_encoder)
    own = tuple(need for need in _repository_needs(config) if not _is_of(need, TEXT_PARTS))
    return own + _repository_needs(apart, TEXT_PARTS)


def _is_of(need: Need, components: Collection[str]) -> bool:
    return need.files == (INDEX,) or any(need.files == (f"{component}/*",) for component in components)


def _repository_needs(config: ModelConfig, only: Collection[str] | None = None) -> tuple[Need, ...]:
    if not is_hub_id(config.path):
        return ()
    release = RELEASES.get(config.path, _UNKNOWN)
    snapshot = _snapshot(config)
    needs = [
        _need(config, release, "model index", (INDEX,), () if snapshot is not None else (INDEX,), 10_000),
    ]
    for component, name in _components(config, snapshot).items():
        there = snapshot is not None and _is_whole(snapshot / component, component)
        kind = component.removesuffix("_full")
        about = release.megabytes.get(kind, 0 if kind == "scheduler" else _SMALL) * 1_000_000
        pattern = f"{component}/*"
        needs.append(_need(config, release, name, (pattern,), () if there else (pattern,), about))
    return tuple(need for need in needs if only is None or _is_of(need, only))


def local_pipeline(path: str, config: ModelConfig, only: Collection[str] | None = None) -> str:
    """The folder that a pipeline is loaded from: `path` where it is one, else the hub model in the cache.

    All that `config` loads must be there; with `only`, these components of the repository `path`.

    Raises:
        OmniNFTError: what of the hub model is not there, with sizes and the command that fetches it.
    """
    if Path(path).exists() or not is_hub_id(path):
        return path
    own = config if only is None else ModelConfig(path=path)
    needs = model_needs(config) if only is None else _repository_needs(own, only)
    why = describe_missing(needs, fetch_command(config))
    snapshot = _snapshot(own)
    if why is not None or snapshot is None:
        raise OmniNFTError(f"{path} is no folder, and as a hub model it is {why}")
    return str(snapshot)


def fetch_command(config: ModelConfig) -> str:
    """The command that fetches this model alone."""
    changes = [f"model.path={config.path}"]
    changes += [f"model.revision={config.revision}"] if config.revision is not None else []
    changes += [f"model.transformer={config.transformer}"] if config.transformer != "transformer" else []
    changes += [f"model.text_encoder={config.text_encoder}"] if config.text_encoder is not None else []
    return shlex.join(["omninft", "fetch", *changes])


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there may be the name of a hub repository: "owner/name"."""
    parts = path.split("/")
    return not Path(path).exists() and len(parts) == 2 and all(parts) and not path.startswith((".", "~"))


def _need(
    config: ModelConfig, release: Release, name: str, files: tuple[str, ...], missing: tuple[str, ...], about: int
) -> Need:
    return Need(
        name=name,
        licence=release.licence,
        files=files,
        missing=missing,
        about=about,
        repo=config.path,
        revision=config.revision,
        gated=release.gated,
    )


def _snapshot(config: ModelConfig) -> Path | None:
    """The folder of the model's revision in the hub's cache, whole or not."""
    try:
        found = try_to_load_from_cache(config.path, INDEX, revision=config.revision)
    except HFValidationError as error:
        raise OmniNFTError(f"model.path is {config.path!r}: {str(error).splitlines()[0]}") from error
    return Path(found).parent if isinstance(found, str) else None


def _components(config: ModelConfig, snapshot: Path | None) -> dict[str, str]:
    """Folders of the repository and what they hold: by its index where that is here, else of any LTX-2."""
    names = list(COMPONENTS)
    if snapshot is not None:
        try:
            index = json.loads((snapshot / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OmniNFTError(f"{snapshot / INDEX}: damaged ({error}); delete it and fetch again") from error
        names = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    folders = [config.transformer if name == "transformer" else name for name in names]
    return {folder: COMPONENTS.get(folder, folder.replace("_", " ")) for folder in folders}


def _is_whole(folder: Path, component: str) -> bool:
    """Whether configuration and all weights of a component are there."""
    files = {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()
    if component in _NO_WEIGHTS:
        return any(name.endswith(".json") for name in files)
    indexes = [folder / name for name in files if name.endswith(".safetensors.index.json")]
    wanted = {"config.json"}
    for index in indexes:
        wanted |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return wanted <= files and any(name.endswith(".safetensors") for name in files)
