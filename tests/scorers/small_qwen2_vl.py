"""A Qwen2-VL of a few thousand weights as a folder like the hub's: published names, flat configuration, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omninft.types import Clip, Prompt

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["system", "user", "assistant", "helpful", "quality", "motion", "END", "a", "red", "ball", "falls", "rate", ":"]
WORDS += ["1", "2", "3", "4", "5"]
CHAT = (
    "<|im_start|>system helpful<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
SMALL = dict(hidden=16, inner=24, layers=2, heads=2, kv_heads=1, rows=40, vision=16, blocks=2, vision_heads=2)
SIZES = {
    "2B": dict(hidden=1536, inner=8960, layers=28, heads=12, kv_heads=2, rows=151936),
    "7B": dict(hidden=3584, inner=18944, layers=28, heads=28, kv_heads=4, rows=152064),
}
for _size in SIZES.values():
    _size |= dict(vision=1280, blocks=32, vision_heads=16)


def published_shapes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, rows: int, vision: int, blocks: int, **_: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the hub's Qwen2-VL checkpoints (transformers 4.45), without lm_head."""
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (vision,),
        "visual.merger.ln_q.bias": (vision,),
        "visual.merger.mlp.0.weight": (4 * vision, 4 * vision),
        "visual.merger.mlp.0.bias": (4 * vision,),
        "visual.merger.mlp.2.weight": (hidden, 4 * vision),
        "visual.merger.mlp.2.bias": (hidden,),
        "model.embed_tokens.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(blocks):
        of = {"norm1": (vision,), "norm2": (vision,), "attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision)}
        of |= {"mlp.fc1": (4 * vision, vision), "mlp.fc2": (vision, 4 * vision)}
        for name, shape in of.items():
            shapes[f"visual.blocks.{i}.{name}.weight"] = shape
            shapes[f"visual.blocks.{i}.{name}.bias"] = shape[:1]
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, out in {"q": hidden, "k": kv, "v": kv}.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, hidden)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Normal tensors large enough that positions and pixels show in the outputs; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        state[name] = 1 + 0.1 * noise if is_norm else noise * (1.0 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
    return state


def flat_config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, rows: int, vision: int, blocks: int, **more: int
) -> dict[str, Any]:
    """config.json in the flat form of the hub."""
    half = hidden // heads // 2
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": rows,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
        if half % 8 == 0
        else {"type": "mrope", "mrope_section": [half - 2, 1, 1]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "image_token_id": len(WORDS) + 5,
        "video_token_id": len(WORDS) + 6,
        "vision_start_token_id": len(WORDS) + 3,
        "vision_end_token_id": len(WORDS) + 4,
        "vision_config": {
            "depth": blocks,
            "embed_dim": vision,
            "mlp_ratio": 4,
            "num_heads": more["vision_heads"],
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words 1.. in order, then the six special tokens; 0 is unknown."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def write_base(folder: Path, **sizes: int) -> Path:
    """config.json and tokenizer; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flat_config(**sizes)))
    make_tokenizer().save_pretrained(str(folder))
    return folder


def make_clip(frames: int = 6, height: int = 40, width: int = 56, text: str = "a red ball", seed: int = 0) -> Clip:
    """Coarse coloured noise at 24 Hz, silent."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    video = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return Clip(video, 24.0, np.zeros((1, 0), np.float32), 16000, Prompt("p", text, "", text))
