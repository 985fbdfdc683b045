from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from omninft.scorers.prompt_template import PromptTemplate
from omninft.scorers.qwen2_vl import (
    BASE_FILES,
    Example,
    RewardReader,
    build_network,
    current_names,
    load_tokens,
    normalised,
    patchify,
    resized,
    smart_resize,
    token_count,
    video_frame_count,
)
from omninft.scorers.weights import JudgingModel
from omninft.types import OmniNFTError
from tests.scorers.small_qwen2_vl import SIZES, SMALL, make_clip, published_shapes, random_state, write_base

BASE = JudgingModel("small base", 0, "none", True, files=BASE_FILES, repo="nobody/nothing")
TOKENS = ("<|A|>", "<|B|>")
TEMPLATE = PromptTemplate(("quality <|A|> END ", " <|B|> END"))


def make_reader(
    folder: Path, positions: Any = "sequential", outputs: int = 3
) -> tuple[RewardReader, dict[str, Tensor]]:
    write_base(folder, **SMALL)
    tokens = load_tokens(BASE, folder, TOKENS)
    shapes = published_shapes(**(SMALL | {"rows": len(tokens.tokenizer)}))
    state = random_state(shapes | {"rm_head.weight": (outputs, 16)})
    head = nn.Linear(16, outputs, bias=False, device="meta")
    network = build_network(BASE, folder, head, current_names(state), torch.float32)
    return RewardReader(network, tokens, TEMPLATE, positions), state


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> RewardReader:
    return make_reader(tmp_path_factory.mktemp("base"))[0]


def examples_of(reader: RewardReader, kind: Any = "video") -> list[Example]:
    """Three of different numbers of tokens."""
    sizes = [(28, 28, 1), (56, 28, 3), (56, 56, 4)] if kind == "video" else [(28, 28, 1), (28, 84, 1), (56, 56, 1)]
    return [
        reader.example("a red ball"[:length], resized(make_clip(t, seed=length).video, h, w), kind)
        for (h, w, t), length in zip(sizes, (1, 5, 10), strict=True)
    ]


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((512, 768), (100352, 200704), (364, 532)),
        ((256, 384), (100352, 200704), (280, 392)),
        ((704, 1280), (100352, 200704), (308, 588)),
        ((512, 768), (200704, 200704), (364, 532)),
        ((256, 384), (200704, 200704), (392, 560)),
        ((704, 1280), (200704, 200704), (308, 588)),
        # 42 / 28 = 1.5 and 70 / 28 = 2.5 both round to 2.
        ((42, 70), (1, 10**9), (56, 56)),
        ((5, 6), (1, 10**9), (28, 28)),
        ((2, 400), (1, 10**9), (28, 392)),
    ],
)
def test_smart_resize(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, *limits) == expected


def test_extreme_shapes_are_refused() -> None:
    with pytest.raises(OmniNFTError, match="2x402 pixels"):
        smart_resize(2, 402, 1, 10**9)


@pytest.mark.parametrize(("size", "tokens"), [((364, 532), 247), ((392, 560), 280), ((308, 588), 231)])
def test_token_count_of_a_picture(size: tuple[int, int], tokens: int) -> None:
    patches, grid = patchify(torch.zeros(1, 3, *size))
    assert grid == (1, size[0] // 14, size[1] // 14)
    assert patches.shape == (4 * tokens, 1176)
    assert token_count(grid) == tokens


@pytest.mark.parametrize(
    ("total", "rate", "fps", "count"),
    [
        (121, 24, 24, 120),
        (121, 24, 2, 10),
        (120, 24, 24, 120),
        (25, 25, 2, 4),  # 2 wanted, at least 4
        (3, 24, 24, 2),  # at least 4, but there are no more
        (2, 24, 2, 2),
        (5000, 25, 25, 768),
        (5000, 25, 2, 400),
        (30, 10, 3, 8),  # 9 / 2 = 4.5 rounds to even
    ],
)
def test_frame_count(total: int, rate: float, fps: float, count: int) -> None:
    assert video_frame_count(total, rate, fps) == count


def test_one_frame_is_no_video() -> None:
    with pytest.raises(OmniNFTError, match="found 1"):
        video_frame_count(1, 24, 24)


def test_normalisation_against_closed_form() -> None:
    out = normalised(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)).flatten().numpy()
    expected = [(128 / 255 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258]
    np.testing.assert_allclose(out, [*expected, (128 / 255 - 0.40821073) / 0.27577711], atol=1e-6)


def test_patch_order_against_indices_counted_one_by_one() -> None:
    t, h, w = 3, 56, 84
    patches, grid = patchify(torch.arange(t * 3 * h * w, dtype=torch.float64).reshape(t, 3, h, w))
    assert grid == (2, 4, 6)
    expected = np.empty((2 * 4 * 6, 1176))
    row = 0
    for pair in range(2):
        for square_y in range(2):
            for square_x in range(3):
                for patch_y in range(2):
                    for patch_x in range(2):
                        column = 0
                        for channel in range(3):
                            for frame in (2 * pair, min(2 * pair + 1, t - 1)):  # the last frame twice
                                for y in range(14):
                                    at_y = square_y * 28 + patch_y * 14 + y
                                    at_x = square_x * 28 + patch_x * 14
                                    start = ((frame * 3 + channel) * h + at_y) * w + at_x
                                    expected[row, column : column + 14] = np.arange(start, start + 14)
                                    column += 14
                        row += 1
    np.testing.assert_array_equal(patches.numpy(), expected)


def test_resize_rounds_and_stays_in_range_unless_told_otherwise() -> None:
    edge = np.zeros((1, 28, 28, 3), np.uint8)
    edge[:, :, 14:] = 255
    rounded, exact = resized(edge, 28, 56), resized(edge, 28, 56, rounded=False)
    assert rounded.dtype == torch.uint8
    assert exact.min() < -1  # bicubic overshoots
    assert exact.max() > 256
    torch.testing.assert_close(rounded.float(), exact.clamp(0, 255).round())


def test_chat_has_one_placeholder_per_token_before_the_text(reader: RewardReader) -> None:
    frames = torch.zeros(3, 3, 56, 28, dtype=torch.uint8)  # grid (2, 4, 2): 4 tokens
    ids = reader.example("a red", frames, "video").ids.tolist()
    words = ["<|im_start|>", "system", "helpful", "<|im_end|>", "<|im_start|>", "user", "<|vision_start|>"]
    words += ["<|video_pad|>"] * 4
    words += ["<|vision_end|>", "quality", "<|A|>", "END", "a", "red", "<|B|>", "END"]
    words += ["<|im_end|>", "<|im_start|>", "assistant"]
    assert ids == [reader.tokens.id(word) for word in words]
    assert reader.tokens.reward_ids == (25, 26)  # behind 19 words and 6 special tokens


@pytest.mark.parametrize("word", ["<|A|>", "<|B|>", "<|video_pad|>", "<|image_pad|>"])
def test_a_prompt_with_a_token_of_the_template_is_refused(reader: RewardReader, word: str) -> None:
    with pytest.raises(OmniNFTError, match="does the prompt hold one"):
        reader.example(f"a {word} ball", torch.zeros(2, 3, 28, 28), "video")


def test_more_tokens_than_places_are_refused(reader: RewardReader) -> None:
    with pytest.raises(OmniNFTError, match=r"2 frames make 3\d{4} tokens, the model reads up to 32768"):
        reader.example("a", torch.zeros(1, 1, 1, 1).expand(2, 3, 28 * 182, 28 * 182), "video")


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_batch_equals_singles_and_permutes(tmp_path: Path, kind: Any, positions: Any) -> None:
    reader, _ = make_reader(tmp_path, positions)
    examples = examples_of(reader, kind)
    singles = torch.cat([reader.outputs([example], 1) for example in examples])
    assert len({len(example) for example in examples}) == 3
    assert singles.shape == (3, 2, 3)
    assert singles.std(dim=0).min() > 0.01
    torch.testing.assert_close(reader.outputs(examples, 10**6), singles, atol=1e-5, rtol=1e-5)
    order = [2, 0, 1]
    torch.testing.assert_close(
        reader.outputs([examples[i] for i in order], 10**6), singles[order], atol=1e-5, rtol=1e-5
    )


def published_model(folder: Path, state: dict[str, Tensor]) -> Qwen2VLForConditionalGeneration:
    """The transformers class with the same weights, put in by hand."""
    config = Qwen2VLConfig.from_pretrained(str(folder))
    config.text_config.vocab_size = len(state["model.embed_tokens.weight"])
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.model.visual.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
    model.model.language_model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    return model


def test_outputs_are_the_head_on_last_hidden_states_at_the_tokens(tmp_path: Path) -> None:
    reader, state = make_reader(tmp_path)
    model, example = published_model(tmp_path, state), examples_of(reader)[2]
    patches, grid = patchify(normalised(example.frames))
    vision = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
    ids, length = example.ids[None], len(example.ids)
    types = (ids == reader.tokens.id("<|video_pad|>")).int() * 2
    with torch.inference_mode():
        plain = model(
            input_ids=ids, position_ids=torch.arange(length).expand(3, 1, -1), output_hidden_states=True, **vision
        )
        mrope = model(input_ids=ids, mm_token_type_ids=types, output_hidden_states=True, **vision)
    at = [i for i, token in enumerate(example.ids.tolist()) if token in (25, 26)]
    head = state["rm_head.weight"].double().numpy()
    results = {}
    for name, out in {"sequential": plain, "mrope": mrope}.items():
        results[name] = out.hidden_states[-1][0, at].double().numpy() @ head.T
    found = reader.outputs([example], 1)[0].numpy()
    np.testing.assert_allclose(found, results["sequential"], atol=1e-4)
    with_axes = RewardReader(reader.network, reader.tokens, TEMPLATE, "mrope").outputs([example], 1)[0].numpy()
    np.testing.assert_allclose(with_axes, results["mrope"], atol=1e-4)
    assert np.abs(results["mrope"] - results["sequential"]).max() > 0.01


def test_sequential_positions_are_those_of_plain_text(reader: RewardReader) -> None:
    """What transformers 4.45 did for position_ids=None: the text model's own 0..L-1."""
    example = examples_of(reader)[1]
    model, pad = reader.network.model, reader.tokens.id("<|video_pad|>")
    patches, grid = patchify(normalised(example.frames))
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(example.ids).clone()
        embedded[example.ids == pad] = model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
        hidden = model.language_model(inputs_embeds=embedded[None], position_ids=None).last_hidden_state[0]
        at = [example.ids.tolist().index(i) for i in (25, 26)]
        expected = reader.network.rm_head(hidden[at])
    torch.testing.assert_close(reader.outputs([example], 1)[0], expected, atol=1e-5, rtol=1e-5)


def test_embedding_rows_are_the_checkpoints(reader: RewardReader) -> None:
    assert reader.network.model.get_input_embeddings().weight.shape == (27, 16)  # the configuration says 40


def test_tokens_behind_the_embedding_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path, **SMALL)
    tokens = load_tokens(BASE, tmp_path, TOKENS)
    state = random_state(published_shapes(**(SMALL | {"rows": 26})) | {"rm_head.weight": (1, 16)})
    head = nn.Linear(16, 1, bias=False, device="meta")
    network = build_network(BASE, tmp_path, head, current_names(state), torch.float32)
    with pytest.raises(OmniNFTError, match=r"26 embedding rows, the tokenizer puts <\|B\|> behind"):
        RewardReader(network, tokens, TEMPLATE)


def test_unknown_positions_are_refused(reader: RewardReader) -> None:
    with pytest.raises(OmniNFTError, match="positions is 'rope', expected 'sequential' or 'mrope'"):
        RewardReader(reader.network, reader.tokens, TEMPLATE, "rope")  # type: ignore[arg-type]


def test_model_is_cast_and_head_and_frequencies_stay_float32(tmp_path: Path) -> None:
    write_base(tmp_path, **SMALL)
    state = random_state(published_shapes(**SMALL) | {"rm_head.weight": (1, 16)})
    head = nn.Linear(16, 1, bias=False, device="meta")
    network = build_network(BASE, tmp_path, head, current_names(state), torch.bfloat16)
    assert network.model.dtype == torch.bfloat16
    assert network.rm_head.weight.dtype == torch.float32
    assert network.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert network.model.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_names_changed_with_transformers_4_52() -> None:
    old = {"visual.merger.ln_q.bias": 1, "model.layers.0.x": 2, "lm_head.weight": 3, "rm_head.0.bias": 4}
    new = {"model.visual.merger.ln_q.bias": 1, "model.language_model.layers.0.x": 2, "rm_head.0.bias": 4}
    assert current_names(old) == new  # type: ignore[arg-type]
    assert current_names(new) == new  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "total", "vision"), [("2B", 2_208_985_600, 0.665), ("7B", 8_291_375_616 - 152064 * 3584, 0.676)]
)
def test_published_names_and_shapes_fit_at_full_size(tmp_path: Path, size: str, total: int, vision: float) -> None:
    """On the meta device; parameter counts of the hub's checkpoints (7B: without its untied lm_head)."""
    shapes = published_shapes(**SIZES[size])
    assert sum(math.prod(s) for s in shapes.values()) == total
    assert round(sum(math.prod(s) for n, s in shapes.items() if n.startswith("visual.")) / 1e9, 3) == vision
    write_base(tmp_path, **SIZES[size])
    hidden = SIZES[size]["hidden"]
    shapes |= {"rm_head.weight": (1, hidden), "model.embed_tokens.weight": (151660, hidden)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    head = nn.Linear(hidden, 1, bias=False, device="meta")
    network = build_network(BASE, tmp_path, head, current_names(state), torch.bfloat16)
    assert sum(p.numel() for p in network.parameters()) == total + (151660 - SIZES[size]["rows"] + 1) * hidden
    state.pop("model.layers.3.mlp.up_proj.weight")
    with pytest.raises(OmniNFTError, match=r"1 missing: model.language_model.layers.3.mlp.up_proj.weight"):
        build_network(BASE, tmp_path, head, current_names(state), torch.bfloat16)


def test_chat_template_of_the_older_file(tmp_path: Path) -> None:
    write_base(tmp_path, **SMALL)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(OmniNFTError, match=r"no chat template.*hf download nobody/nothing chat_template.json"):
        load_tokens(BASE, tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "own"}))
    assert load_tokens(BASE, tmp_path).tokenizer.chat_template == "own"
