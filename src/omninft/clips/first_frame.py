"""Given first frames of image-to-video prompts."""

from __future__ import annotations

import cv2
import torch
from torch import Tensor

from omninft.types import OmniNFTError


def read_first_frame(path: str, height: int, width: int) -> Tensor:
    """The picture at `path`, [height, width, 3] uint8 RGB: scaled to cover the frame, then cropped around its centre.

    Raises:
        OmniNFTError: the file is no picture.
    """
    picture = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise OmniNFTError(f"first frame {path} cannot be read as a picture; expected PNG or JPEG")
    scale = max(height / picture.shape[0], width / picture.shape[1])
    if scale != 1:
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return torch.from_numpy(picture[top : top + height, left : left + width].copy())
