"""The text side of the bundled model: a word-level tokenizer and a small, random, frozen Gemma 3 encoder.

Only the connectors and the transformer learn; distinct random embeddings are all that a world of fifty words needs.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from omninft.pretrain import sizes
from omninft.worlds.wording import vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the world's prompts, `<bos>` in front, padded on the left as Gemma's is."""
    words = [*SPECIAL, *vocabulary()]
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=sizes.TEXT_TOKENS,
    )


def build_text_encoder(seed: int) -> Gemma3ForConditionalGeneration:
    """The frozen encoder; `seed` fixes its random weights."""
    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config=sizes.TEXT_ENCODER["text"],
        vision_config=sizes.TEXT_ENCODER["vision"],
        mm_tokens_per_image=sizes.TEXT_ENCODER["mm_tokens_per_image"],
    )
    return Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


@torch.no_grad()
def encode_captions(
    encoder: Gemma3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Hidden states of all layers [B, L, width * layers] and mask [B, L], as connectors read them."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=sizes.TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    return torch.stack(states.hidden_states, dim=-1).flatten(2, 3), tokens.attention_mask
