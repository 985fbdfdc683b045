"""AudioBox Aesthetics (Tjandra et al. 2025): how people would rate a sound on four axes, each about 1 to 10.

CE content enjoyment, CU content usefulness, PC production complexity, PQ production quality. A WavLM-base encoder, and
per axis: a softmax-weighted sum of its 13 hidden states, the mean over valid frames, L2 normalisation, an MLP, and
x * std + mean with numbers stored beside the weights. The encoder is transformers' WavLMModel; the released names are
those of the original WavLM. Licence of code and weights: CC-BY-4.0. It runs in float32 as the released code does (its
autocast switch never takes effect).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WavLMConfig, WavLMModel

from omninft.scorers.views import fit_length
from omninft.scorers.weights import JudgingModel, load_strict, renamed
from omninft.types import OmniNFTError

AXES = ("CE", "CU", "PC", "PQ")
RATE = 16_000  # Hz
WINDOW = 10 * RATE  # samples; also the hop

CARD = JudgingModel(
    name="AudioBox Aesthetics",
    parameters=94_400_000,
    licence="CC-BY-4.0",
    commercial=True,
    files=("config.json", "model.safetensors"),
    repo="facebook/audiobox-aesthetics",
    revision="9b1dd8e5df9af7216e836a98974fe3b82c56ded6",
    sha256={"model.safetensors": "a5a3c2412649cc2384ec525ffd5180ce6c4778f43bed6108e0a1303de04d014e"},
)

# What the released class takes where the file does not say.
_DEFAULTS: dict[str, Any] = {
    "proj_num_layer": 1,
    "proj_ln": False,
    "proj_act_fn": "gelu",
    "proj_dropout": 0,
    "nth_layer": 13,
    "use_weighted_layer_sum": True,
    "normalize_embed": True,
    "output_dim": 1,
}

# Original WavLM name -> transformers' name; the first pattern that matches counts.
_RENAMES = [
    (r"mask_emb", "masked_spec_embed"),
    (r"layer_norm\.(.*)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(.*)", r"feature_projection.projection.\1"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.*)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(.*)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"encoder\.pos_conv\.0\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"encoder\.pos_conv\.0\.bias", "encoder.pos_conv_embed.conv.bias"),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_linear\.(.*)", r"\1.attention.gru_rel_pos_linear.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn\.grep_a", r"\1.attention.gru_rel_pos_const"),
    (r"(encoder\.layers\.\d+)\.self_attn\.relative_attention_bias\.(.*)", r"\1.attention.rel_attn_embed.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn\.(.*)", r"\1.attention.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(.*)", r"\1.layer_norm.\2"),
    (r"(encoder\.layers\.\d+)\.fc1\.(.*)", r"\1.feed_forward.intermediate_dense.\2"),
    (r"(encoder\.layers\.\d+)\.fc2\.(.*)", r"\1.feed_forward.output_dense.\2"),
]


def released_name(name: str) -> str:
    """The name in `AudioBox` of a released tensor; checkpoint.pt has "model." in front of every name."""
    name = name.removeprefix("model.")
    encoder = name.removeprefix("wavlm_model.")
    if encoder == name:
        return name
    for pattern, replacement in _RENAMES:
        if re.fullmatch(pattern, encoder):
            return "wavlm_model." + re.sub(pattern, replacement, encoder)
    return name


def windows(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] at RATE, N > 0, to windows [W, WINDOW] and their valid lengths [W]: one after the other, zeros at the end."""
    starts = range(0, len(wave), WINDOW)
    lengths = np.array([min(WINDOW, len(wave) - start) for start in starts])
    return np.stack([fit_length(wave[start : start + WINDOW], WINDOW) for start in starts]), lengths


def valid_frames(mask: Tensor, count: int) -> Tensor:
    """[B, N] valid samples to [B, count] valid frames: a frame counts when any of its N // count samples does."""
    hop = mask.shape[1] // count
    return mask[:, : hop * count].unflatten(1, (count, hop)).any(dim=-1)


class _Encoder(WavLMModel):
    """WavLM with the original rule for which frames count; transformers' own drops one or two more at the end."""

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Tensor, add_adapter: bool | None = None
    ) -> Tensor:
        return valid_frames(attention_mask, feature_vector_length)


class AudioBox(nn.Module):
    """The network; `config` is the released config.json, `encoder` other sizes than WavLM-base's, for tests.

    Raises:
        OmniNFTError: a configuration that the released weights do not have and this class does not compute.
    """

    def __init__(self, config: Mapping[str, Any], encoder: WavLMConfig | None = None) -> None:
        super().__init__()
        settings = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
        self.wavlm_model = _Encoder(encoder or WavLMConfig())
        width = self.wavlm_model.config.hidden_size
        states = self.wavlm_model.config.num_hidden_layers + 1
        computed = {"proj_act_fn": "gelu", "nth_layer": states, "use_weighted_layer_sum": True, "output_dim": 1}
        for key, expected in computed.items():
            if settings[key] != expected:
                raise OmniNFTError(f"{CARD.name}: {key} is {settings[key]!r} in config.json, expected {expected!r}")
        self.normalize_embed = bool(settings["normalize_embed"])
        self.proj_layer = nn.ModuleDict({axis: _head(width, settings) for axis in AXES})
        self.layer_weights = nn.ParameterDict({axis: nn.Parameter(torch.ones(states) / states) for axis in AXES})
        self.targets = _targets(config)

    def forward(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Windows [B, WINDOW] with `lengths` [B] valid samples to ratings [B, 4] in the order of AXES, normalised."""
        mask = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
        states = self.wavlm_model(waves, attention_mask=mask, output_hidden_states=True).hidden_states
        frames = valid_frames(mask, states[0].shape[1])[..., None].to(waves.dtype)
        count = frames.sum(dim=1).clamp(min=1)
        # The mean over time and the sum over layers are linear: taking the mean first spares the 13 states of a stack.
        pooled = torch.stack([(state * frames).sum(dim=1) / count for state in states], dim=-1)  # [B, C, 13]
        ratings = []
        for axis in AXES:
            embedding = pooled @ self.layer_weights[axis].softmax(dim=-1)
            if self.normalize_embed:
                embedding = functional.normalize(embedding, dim=-1)
            ratings.append(self.proj_layer[axis](embedding)[:, 0])
        return torch.stack(ratings, dim=1)


def _head(width: int, settings: Mapping[str, Any]) -> nn.Sequential:
    """proj_num_layer linear layers; after each but the last a layer norm (if proj_ln), GELU, dropout (if any)."""
    layers: list[nn.Module] = []
    for _ in range(settings["proj_num_layer"] - 1):
        layers.append(nn.Linear(width, width))
        layers += [nn.LayerNorm(width)] if settings["proj_ln"] else []
        layers.append(nn.GELU())
        layers += [nn.Dropout(settings["proj_dropout"])] if settings["proj_dropout"] else []
    return nn.Sequential(*layers, nn.Linear(width, settings["output_dim"]))


def _targets(config: Mapping[str, Any]) -> np.ndarray:
    """[4, 2] mean and standard deviation per axis."""
    try:
        rows = [config["target_transform"][axis] for axis in AXES]
        return np.array([[float(row["mean"]), float(row["std"])] for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise OmniNFTError(
            f"{CARD.name}: config.json has no target_transform with mean and std of {', '.join(AXES)}"
        ) from error


class AudioBoxScorer:
    """Ratings of sounds."""

    def __init__(self, model: AudioBox, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(device, dtype).eval()
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def __call__(self, waves: Sequence[np.ndarray], budget: int) -> np.ndarray:
        """Mono waves [N] at RATE to ratings [len(waves), 4], float64: means over windows by their valid lengths.

        A forward pass takes `budget` windows of 10 s at most.
        """
        cut = [windows(wave) for wave in waves]
        samples = np.concatenate([window for window, _ in cut])
        lengths = np.concatenate([length for _, length in cut])
        ratings = np.empty((len(samples), len(AXES)))
        for start in range(0, len(samples), budget):
            batch = slice(start, start + budget)
            inputs = torch.from_numpy(samples[batch]).to(self.device, self.dtype)
            ratings[batch] = self.model(inputs, torch.from_numpy(lengths[batch]).to(self.device)).double().cpu()
        ratings = ratings * self.model.targets[:, 1] + self.model.targets[:, 0]
        owner = np.repeat(np.arange(len(waves)), [len(length) for _, length in cut])
        return np.stack(
            [np.average(ratings[owner == i], axis=0, weights=lengths[owner == i]) for i in range(len(waves))]
        )


def load_audiobox(
    path: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    encoder: WavLMConfig | None = None,
) -> AudioBoxScorer:
    """The released weights, from `path` or the hub's cache. Raises OmniNFTError for missing or unfit files."""
    config = json.loads(CARD.locate(path)["config.json"].read_text())
    model = AudioBox(config, encoder)
    load_strict(model, renamed(CARD.state("model.safetensors", path), released_name), CARD.name)
    return AudioBoxScorer(model, device, dtype)
