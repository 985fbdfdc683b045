from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omninft.evaluation.frechet import frechet_audio_distance, frechet_distance, kernel_distance
from omninft.evaluation.set_metrics import audio_distance, audioclip_input, i3d_input, read_features, video_distance
from omninft.types import OmniNFTError
from tests.moving_clips import moving_clip, with_sound


class Means(nn.Module):
    """[1, 3, T, H, W] to [1, 3, T]: means of the frames; and [1, N] to [1, 4] quarters' means."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return x.mean(dim=[3, 4])
        return x.reshape(1, 4, -1).abs().mean(dim=2)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.jit.script(Means()).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


@pytest.fixture(autouse=True)
def _own_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNINFT_WEIGHTS", str(tmp_path / "cache"))


def test_frames_for_i3d_are_padded_to_a_square_and_scaled() -> None:
    clip = moving_clip(0, frames=97, height=48, width=96)
    pixels = i3d_input(clip)
    assert pixels.shape == (3, 24, 224, 224)
    assert (pixels[:, :, :56] == -1).all()
    assert (pixels[:, :, 168:] == -1).all()
    assert pixels[:, :, 60:160].min() > -1
    # The last of frames round(i * 96 / 23); half of it is black: ((2 v - 1) - 1) / 2.
    assert float(pixels[:, 23].mean()) == pytest.approx(clip.video[96].mean() / 255 - 1, abs=0.01)
    unscaled = i3d_input(clip, unscaled=True)
    assert 0 <= unscaled.min() < unscaled.max() <= 1
    torch.testing.assert_close(unscaled * 2 - 1, pixels)
    assert i3d_input(moving_clip(0, frames=3, height=448, width=448)).shape == (3, 24, 224, 224)


def test_sound_for_audioclip_is_4_s_at_16_khz() -> None:
    clip = with_sound(moving_clip(0), np.full((2, 48_000), 0.5), 48_000)
    wave = audioclip_input(clip)
    assert wave.shape == (64_000,)
    assert float(wave[8000]) == pytest.approx(0.5, abs=1e-3)
    assert not wave[16_100:].any()


def test_features_of_a_network_and_distances_from_real_ones(network: Path) -> None:
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, (9, 3))
    one = video_distance(network=network, real=real)
    assert one.missing() is None
    clips = [moving_clip(i, frames=30) for i in range(3)]
    features = np.stack(one.features(clips))
    expected = [i3d_input(c).mean(dim=(1, 2, 3)).numpy() for c in clips]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    values = one.values(features)
    assert values == {"fvd": frechet_distance(features, real), "kvd": kernel_distance(features, real)}
    raised = video_distance(network=network, real=real, unscaled=True).features(clips)
    np.testing.assert_allclose(np.stack(raised) * 2 - 1, features, atol=1e-5)


def test_sound_features_and_fad(network: Path) -> None:
    real = np.random.default_rng(0).uniform(0, 1, (9, 4))
    one = audio_distance(network=network, real=real)
    clips = [moving_clip(0, frames=96), with_sound(moving_clip(1), np.zeros((1, 0))), moving_clip(2, frames=96)]
    first, silent, last = one.features(clips)
    assert isinstance(silent, OmniNFTError)
    assert "no sound" in str(silent)
    both = np.stack([np.asarray(first), np.asarray(last)])
    assert one.values(both) == {"fad": frechet_audio_distance(both, real)}


def test_what_is_missing_is_said(network: Path, tmp_path: Path) -> None:
    real = np.zeros((3, 3))
    assert "--real" in str(video_distance(network=network).missing())
    assert "--i3d" in str(video_distance(real=real).missing())
    assert "--audioclip" in str(audio_distance(real=real).missing())
    assert video_distance(real=real, given=real).missing() is None
    (tmp_path / "bad.pt").write_bytes(b"x")
    with pytest.raises(OmniNFTError, match="not a TorchScript file"):
        audio_distance(network=tmp_path / "bad.pt", real=real).features([moving_clip(0)])


def test_files_of_features(tmp_path: Path) -> None:
    video, audio = torch.randn(4, 3), torch.randn(4, 2, dtype=torch.float64)
    torch.save({"video": video, "audio": audio}, tmp_path / "real.pt")
    save_file({"video": video}, tmp_path / "some.safetensors")
    save_file({"x": video}, tmp_path / "other.safetensors")
    save_file({"video": video[0]}, tmp_path / "flat.safetensors")
    found, digest = read_features(tmp_path / "real.pt")
    np.testing.assert_array_equal(found["video"], video.double().numpy())
    np.testing.assert_array_equal(found["audio"], audio.numpy())
    assert len(digest) == 64
    assert list(read_features(tmp_path / "some.safetensors")[0]) == ["video"]
    assert read_features(None) == ({}, "")
    for name, message in (
        ("other.safetensors", "expected tensors named video or audio"),
        ("flat.safetensors", r"\[3\]"),
    ):
        with pytest.raises(OmniNFTError, match=message):
            read_features(tmp_path / name)
    with pytest.raises(OmniNFTError, match="no such file of features"):
        read_features(tmp_path / "absent")
