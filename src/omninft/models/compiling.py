"""Compiled transformer blocks: one graph for all blocks of a class, whatever their number."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from omninft.types import OmniNFTError

# A block is compiled for each adapter, with and without gradients, and for each way of guidance; past the limit (8 by
# default) torch would fall back to eager code in silence.
RECOMPILE_LIMIT = 64


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """Compile the repeated blocks, at their first call. Hooks (surgery) have to be set by then.

    Raises:
        OmniNFTError: the model does not name its repeated blocks.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    try:
        transformer.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise OmniNFTError(f"model.compile: {type(transformer).__name__} names no repeated blocks ({error})") from error


def uncompiled(yes: bool) -> AbstractContextManager[object]:
    """Compiled blocks run as they are written inside, if `yes`: what records has side effects on Python objects."""
    return torch.compiler.set_stance("force_eager") if yes else nullcontext()
