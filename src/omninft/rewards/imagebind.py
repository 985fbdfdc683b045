"""ImageBind: how well picture, sound and their prompts go together.

(cos(prompt_v, video) + cos(prompt_a, audio) + cos(audio, video)) / 3, a mean although OmniNFT calls it "imagebind_sum".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from omninft.hub import Need
from omninft.rewards.model_reward import ModelReward, prompt_text
from omninft.rewards.registry import ComponentSpec, Input
from omninft.scorers.imagebind import IMAGEBIND, ImageBindScorer, cosines, load_imagebind
from omninft.scorers.imagebind_inputs import CLIP_TOKENS, audio_views, check_spacing, first_channel, video_views
from omninft.scorers.weights import JudgingModel
from omninft.types import Clip, OmniNFTError


@dataclass(frozen=True)
class _Inputs:
    video: list[Tensor]  # 15 x [3, 2, 224, 224]
    audio: list[Tensor]  # 3 x [1, 128, 204]
    prompt_v: str
    prompt_a: str


class ImageBindReward(ModelReward[_Inputs]):
    """Options beyond the common ones:

    `tokenizer` is CLIP's tokenizer.json or its folder (default: the hub cache). `clip_spacing` "n-1" (default)
    spreads the 2 s clips over the whole clip; "n" is pytorchvideo 0.1.5, which never sees the end. `keep_end` False
    cuts the end token off prompts of more than 77 tokens, as the published tokeniser does.
    """

    name = "imagebind"
    components: tuple[ComponentSpec, ...] = (
        ComponentSpec("imagebind", "joint", "mean of three cosines: text-video, text-audio, audio-video", 1.0, (-1, 1)),
    )
    inputs: tuple[Input, ...] = ("video", "audio", "prompt_v", "prompt_a")
    model: JudgingModel | None = IMAGEBIND
    default_budget = 32  # views or texts in a forward pass

    def __init__(
        self,
        tokenizer: str | Path | None = None,
        clip_spacing: str = "n-1",
        keep_end: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.tokenizer = tokenizer
        self.clip_spacing = check_spacing(clip_spacing)
        if not isinstance(keep_end, bool):
            raise OmniNFTError(f"keep_end is {keep_end!r}, expected true or false")
        self.keep_end = keep_end

    def missing(self) -> str | None:
        lacking = [super().missing(), None if self._scorer is not None else CLIP_TOKENS.missing(self.tokenizer)]
        return "; ".join(why for why in lacking if why is not None) or None

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, CLIP_TOKENS.need(self.tokenizer))

    def load(self) -> ImageBindScorer:
        return load_imagebind(self.path, self.tokenizer, self.device, self.dtype, self.keep_end)

    def prepare(self, clip: Clip) -> _Inputs:
        return _Inputs(
            video_views(clip, self.clip_spacing),
            audio_views(first_channel(clip), self.clip_spacing),
            prompt_text(clip, "prompt_v"),
            prompt_text(clip, "prompt_a"),
        )

    def judge(self, prepared: list[_Inputs]) -> np.ndarray:
        """[B, 1]"""
        scorer: ImageBindScorer = self.scorer
        video = scorer.videos([item.video for item in prepared], self.budget)
        audio = scorer.sounds([item.audio for item in prepared], self.budget)
        texts = scorer.texts([text for item in prepared for text in (item.prompt_v, item.prompt_a)], self.budget)
        total = cosines(texts[0::2], video) + cosines(texts[1::2], audio) + cosines(audio, video)
        return total[:, None] / 3
