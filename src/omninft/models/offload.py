"""Blocks that wait in host memory and come to the device one by one, while the one before them computes.

Only what is frozen travels: adapters stay on the device, where the optimiser has them. A block's weights are put into
its modules as tensors of their own and the host's are put back later, so that a graph that still needs them keeps them:
gradients are right in any case, and memory is saved where activation checkpointing computes blocks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Slot:
    """A frozen parameter or buffer, and where its module looks it up."""

    place: dict[str, Tensor | None]
    name: str
    host: Tensor


class BlockStream:
    """Brings the frozen tensors of a block to `device` before its forward, and the next block's after them.

    Args:
        blocks: in the order of the forward; their frozen tensors are on the host, and pinned there for CUDA.
        device: where they compute. Adapters (modules named `lora_...`) are moved there now.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._slots = [self._find_slots(block) for block in blocks]
        self._copies: dict[int, list[Tensor]] = {}
        self._ready: dict[int, Any] = {}  # CUDA events
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(number))

    @property
    def resident(self) -> set[int]:
        """Blocks with a copy on the device: the last one used, and the one that is expected next."""
        return set(self._copies)

    def _find_slots(self, block: nn.Module) -> list[_Slot]:
        slots = []
        for path, module in block.named_modules():
            if "lora_" in path:
                module.to(self.device)
                continue
            for place in (module._parameters, module._buffers):
                for name, tensor in place.items():
                    if tensor is None:
                        continue
                    if self.device.type == "cuda":
                        tensor = place[name] = _each(tensor, lambda t: t.cpu().pin_memory())
                    slots.append(_Slot(place, name, tensor))
        return slots

    def _hook(self, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            self.fetch(number)

        return before

    def fetch(self, number: int) -> None:
        """Put block `number` on the device, start the copy of the next one, and let the others go."""
        # A backward computes blocks again from the last one down.
        backwards = number in (self._last, self._last - 1)
        self._last = number
        following = max(number - 1, 0) if backwards else (number + 1) % len(self._slots)
        for other in self.resident - {number, following}:
            for slot in self._slots[other]:
                slot.place[slot.name] = slot.host
            if self._side is not None:  # a copy under way must end before its memory is used again
                torch.cuda.current_stream(self.device).wait_event(self._ready.pop(other))
            del self._copies[other]
        self._start(number)
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[number])
        for slot, copy in zip(self._slots[number], self._copies[number], strict=True):
            slot.place[slot.name] = copy
        self._start(following)

    def _start(self, number: int) -> None:
        if number in self._copies:
            return
        # Memory comes from the stream that computes and returns to it; the side stream waits until it is free.
        if self._side is not None:
            empty = [
                _each(slot.host, lambda t: torch.empty_like(t, device=self.device)) for slot in self._slots[number]
            ]
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                for target, slot in zip(empty, self._slots[number], strict=True):
                    for to, source in zip(_parts(target), _parts(slot.host), strict=True):
                        to.copy_(source, non_blocking=True)
                self._ready[number] = self._side.record_event()
            self._copies[number] = empty
        else:
            self._copies[number] = [
                _each(slot.host, lambda t: t.to(self.device, copy=True)) for slot in self._slots[number]
            ]


@contextmanager
def staying_on_the_host(blocks_of: nn.Module, stay: bool) -> Iterator[None]:
    """What moves the transformer inside leaves its blocks where they are, if they `stay`."""
    blocks = blocks_of.transformer_blocks
    if stay:
        blocks_of.transformer_blocks = nn.ModuleList()
    try:
        yield
    finally:
        blocks_of.transformer_blocks = blocks


def _parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that a quantised one is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _each(tensor: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` made of changed parts; a parameter where it is one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: _each(getattr(tensor, name), change) for name in names}
        made = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    else:
        made = change(tensor.detach())
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
