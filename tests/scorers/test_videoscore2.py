from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from omninft.scorers.qwen2_vl import normalised, patchify
from omninft.scorers.videoscore2 import MODEL, load_videoscore2, missing, read_scores
from omninft.types import OmniNFTError
from tests.scorers.small_qwen2_vl import SMALL, flat_config, make_clip, make_tokenizer

# A verdict in tokens; the reasoning before it mentions a dimension with another digit.
ANSWER = ["visual", " quality", ":", " ", "2", " at first.", "\n(1) visual", " quality", ":", " ", "4", ",\n(2) "]
ANSWER += ["text-to-video", " alignment", ": ", "3", "\n(3) physical/", "common-sense consistency:", " **", "1", "**"]
AT = (10, 15, 19)


def logits_of(shares: dict[int, tuple[float, ...]]) -> np.ndarray:
    """[steps, 5], equal logits but where shares are given."""
    logits = np.zeros((len(ANSWER), 5), np.float32)
    for step, five in shares.items():
        logits[step] = np.log(np.array(five)) + 7.0  # a constant over the five changes nothing
    return logits


SCRIPT = logits_of(
    {10: (0.0625, 0.0625, 0.125, 0.5, 0.25), 15: (0.1, 0.2, 0.4, 0.2, 0.1), 19: (0.6, 0.1, 0.1, 0.1, 0.1)}
)


def test_expected_value_is_the_sum_of_digits_times_shares() -> None:
    visual = 1 * 0.0625 + 2 * 0.0625 + 3 * 0.125 + 4 * 0.5 + 5 * 0.25
    np.testing.assert_allclose(read_scores(ANSWER, SCRIPT), [visual, 3.0, 0.6 + 0.2 + 0.3 + 0.4 + 0.5], rtol=1e-6)


def test_soft_and_hard_readings() -> None:
    np.testing.assert_allclose(read_scores(ANSWER, SCRIPT, "soft"), [4 * 0.5, 3 * 0.4, 1 * 0.6], rtol=1e-6)
    np.testing.assert_array_equal(read_scores(ANSWER, SCRIPT, "hard"), [4, 3, 1])


@pytest.mark.parametrize("digit", ["7", "44", "3.5", "0", "good"])
def test_a_verdict_without_a_digit_from_1_to_5_is_missing(digit: str) -> None:
    pieces = ["Visual quality: ", digit, "; text-to-video alignment: ", "5", "."]
    scores = read_scores(pieces, np.zeros((5, 5)), "hard")
    np.testing.assert_array_equal(scores, [np.nan, 5, np.nan])


def test_a_digit_inside_a_longer_token_has_no_probabilities() -> None:
    pieces = ["visual quality:", " 4"]
    assert math.isnan(read_scores(pieces, np.zeros((2, 5)))[0])
    assert read_scores(pieces, np.zeros((2, 5)), "hard")[0] == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with the tokenizer of the other tests, and a template in the form of the official code."""
    place = tmp_path_factory.mktemp("videoscore2")
    flat = flat_config(**SMALL)
    vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16, window_size=56)
    vision |= dict(fullatt_block_indexes=[1], tokens_per_second=4)
    flat |= {"model_type": "qwen2_5_vl", "vision_config": vision, "tie_word_embeddings": False}
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**flat))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.generation_config.repetition_penalty = 1.5  # must not matter
    network.save_pretrained(str(place))
    make_tokenizer().save_pretrained(str(place))
    (place / "vs2_inference.py").write_text('from string import Template\nQ = Template("rate $t2v_prompt : ")\n')
    return place


def load(folder: Path) -> Any:
    scorer = load_videoscore2(folder, dtype=torch.float32)
    object.__setattr__(scorer, "longest_answer", 6)
    return scorer


def test_generated_answers_are_greedy_and_equal_in_a_batch_and_alone(folder: Path) -> None:
    scorer = load(folder)
    clips = [make_clip(4, 28, 28), make_clip(50, 40, 200, "a red ball falls", seed=1)]
    examples = [scorer.prepare(clip, clip.prompt.prompt_v) for clip in clips]
    assert examples[1].frames.shape[0] == 4  # 50 / 24 s at 2 fps
    together = scorer.answers(examples)
    for example, (pieces, logits) in zip(examples, together, strict=True):
        ((alone, alone_logits),) = scorer.answers([example])
        assert pieces == alone
        assert len(pieces) == 6
        np.testing.assert_allclose(logits, alone_logits, atol=1e-4)


def test_recorded_logits_are_the_networks_own(folder: Path) -> None:
    """The first step, from a plain forward pass; the second, with the first token appended."""
    scorer = load(folder)
    example = scorer.prepare(make_clip(48, 28, 56), "a red ball")
    ((pieces, logits),) = scorer.answers([example])
    patches, grid = patchify(normalised(example.frames))
    ids, digits = example.ids[None], [scorer.tokens.id(d) for d in "12345"]
    for step in range(2):
        with torch.inference_mode():
            out = scorer.network(
                input_ids=ids,
                mm_token_type_ids=(ids == scorer.tokens.id("<|video_pad|>")).int() * 2,
                pixel_values_videos=patches,
                video_grid_thw=torch.tensor([grid]),
                second_per_grid_ts=torch.tensor([1.0]),  # two frames at 2 fps
            ).logits[0, -1]
        np.testing.assert_allclose(logits[step], out[digits].numpy(), atol=1e-4)
        best = int(out.argmax())
        assert scorer.tokens.tokenizer.decode([best]) == pieces[step]
        ids = torch.cat([ids, torch.tensor([[best]])], dim=1)


def test_judge_reads_each_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load(folder)
    silent = (["no verdict"], np.zeros((1, 5), np.float32))
    monkeypatch.setattr(
        type(scorer), "answers", lambda self, some: [silent if len(e) > 310 else (ANSWER, SCRIPT) for e in some]
    )
    long, short = (scorer.prepare(make_clip(n, 28, 28), "a") for n in (96, 4))  # 8 frames and 4, 144 tokens a pair
    assert len(short) < 310 < len(long)
    scores = scorer.judge([long, short], 10**6, "hard")
    np.testing.assert_array_equal(scores, [[np.nan] * 3, [4, 3, 1]])


def test_missing_names_shards_and_template(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))
    assert missing(folder) is None
    for name in MODEL.files:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    text = str(missing(tmp_path))
    assert "missing model-00001-of-00002.safetensors in" in text
    assert f"hf download TIGER-Lab/VideoScore2 --local-dir {tmp_path}" in text
    assert "vs2_inference.py" in text
    with pytest.raises(OmniNFTError, match="missing model-00001"):
        load_videoscore2(tmp_path)
