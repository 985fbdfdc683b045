"""Given first frames of image-to-video prompts."""

from __future__ import annotations

import stat
from pathlib import Path

import cv2
import torch
from PIL import Image
from torch import Tensor

from omninft.types import OmniNFTError

MOST_PIXELS = 2**26  # 8192 x 8192, which takes 192 MiB; no model makes larger frames
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def read_first_frame(path: str, height: int, width: int) -> Tensor:
    """The picture at `path`, [height, width, 3] uint8 RGB: scaled to cover the frame, then cropped around its centre.

    Raises:
        OmniNFTError: the file is no picture, or one of more than `MOST_PIXELS`, by its header.
    """
    _require_size(path)
    try:
        picture = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise _unreadable(path, error) from error
    if picture is None:
        raise _unreadable(path, "damaged")
    scale = max(height / picture.shape[0], width / picture.shape[1])
    if scale != 1:
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return torch.from_numpy(picture[top : top + height, left : left + width].copy())


def _require_size(path: str) -> None:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise _unreadable(path, "no regular file")
        with Image.open(path, formats=_FORMATS) as picture:  # reads the header only
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if width * height > MOST_PIXELS:
        raise _unreadable(path, f"{width} x {height} pixels, at most {MOST_PIXELS} are allowed")


def _unreadable(path: str, why: object) -> OmniNFTError:
    reason = " ".join(str(why).split())
    return OmniNFTError(f"first frame {path} cannot be read as a picture ({reason}); expected PNG or JPEG")
