"""What an update measures, on vectors small enough to compute by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omninft.distributed import Processes
from omninft.learning.probes import RewardProbe, deviation, gradients_of, gram, norms_by_stream
from omninft.models.ltx2 import stream_of
from omninft.types import Latents


def test_gradients_are_returned_and_not_kept() -> None:
    a, b = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.tensor([5.0]))
    loss = a.square().sum()
    found = gradients_of(loss, [a, b])
    assert [g.tolist() for g in found] == [[4, 6], [0]]  # b takes no part
    assert a.grad is None
    assert [g.tolist() for g in gradients_of(loss, [a, b])] == [[4, 6], [0]]  # the graph is still there


def test_norms_are_told_apart_by_the_stream_that_is_written() -> None:
    names = ["blocks.0.audio_to_video_attn.to_k.a", "blocks.0.video_to_audio_attn.to_k.a", "blocks.0.ff.net.2.a"]
    gradients = [torch.tensor([3.0]), torch.tensor([7.0]), torch.tensor([4.0])]
    assert norms_by_stream(gradients, names, stream_of) == {"video": 5.0, "audio": 7.0}


def test_inner_products_are_over_all_parameters_and_none_is_zeros() -> None:
    a, b = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])], [torch.tensor([[4.0, 5.0]]), torch.tensor([-6.0])]
    assert gram([a, None, b]).tolist() == [[14, 0, -4], [0, 0, 0], [-4, 0, 77]]


def test_a_probe_adds_up_micro_batches_and_weighs_the_branches_by_their_shares() -> None:
    probe = RewardProbe(2, (0.75, 0.25))
    gradient = [torch.tensor([4.0, 0.0])]
    probe.add(0, 0, gradient)
    probe.add(0, 0, [torch.tensor([0.0, 4.0])])
    probe.add(0, 1, [torch.tensor([8.0, 8.0])])
    probe.add(1, 1, [torch.tensor([0.0, 12.0])])
    assert gradient[0].tolist() == [4, 0]  # the caller's own is not added to
    made = probe.result(Processes())
    assert made.video.tolist() == [[32, 0], [0, 0]]
    assert made.audio.tolist() == [[128, 96], [96, 144]]
    # .75 (4, 4) + .25 (8, 8) = (5, 5), and .25 (0, 12) = (0, 3)
    assert made.both.tolist() == [[50, 15], [15, 9]]


def test_deviation_is_a_sum_over_clips_of_means_over_free_tokens() -> None:
    old = Latents(torch.zeros(2, 3, 2), torch.zeros(2, 2, 1))
    video = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[..., None].expand(2, 3, 2)
    current = Latents(video, torch.tensor([[[2.0], [4.0]], [[-6.0], [0.0]]]))
    sigma = torch.tensor([0.5, 0.25])
    picture, sound = deviation(current, old, sigma, None)
    assert picture == pytest.approx(0.5 * 2 + 0.25 * 5)
    assert sound == pytest.approx(0.5 * 3 + 0.25 * 3)
    free = torch.tensor([[False, True, True], [False, False, False]])
    assert deviation(current, old, sigma, free)[0] == pytest.approx(0.5 * 2.5)  # a clip that is all given adds 0
