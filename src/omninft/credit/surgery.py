"""Layer-wise gradient surgery: how much of one branch's loss reaches the other branch's layers.

OmniNFT (Zhang et al. 2026, arXiv:2605.12480), technique 2. In audio-to-video cross-attention (A2V) the audio hidden
state gives keys and values to the video stream, so the video loss sends gradient into audio layers. Surgery scales
that gradient block by block and leaves every forward value alone: h -> sg(h) + s (h - sg(h)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from omninft.models.protocol import CrossSite
from omninft.types import OmniNFTError

Target = Literal["input", "projection"]


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by what the hook with this key says when the backward gets here."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, key: Tensor) -> Tensor:
        # An attribute, not a saved tensor: activation checkpointing compares what forward and recomputation save.
        ctx.key = key
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _scale_by_hook(gradients[0], ctx.key), None


def _cross(h: Tensor, key: Tensor) -> Tensor:
    out: Tensor = _ScaleGradient.apply(h, key)  # type: ignore[no-untyped-call]
    return out


# Opaque to compilers: the factor is looked up, and the call counted, whenever a backward runs. The key is a tensor
# because one graph serves all blocks, and on the CPU because reading it must not wait for the device.
@torch.library.custom_op("omninft::scale_by_hook", mutates_args=())
def _scale_by_hook(gradient: Tensor, key: Tensor) -> Tensor:
    hook = _HOOKS.get(int(key))
    scale = 1.0 if hook is None else hook.read_scale()
    return gradient.clone() if scale == 1 else gradient * scale


@_scale_by_hook.register_fake
def _(gradient: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def scale_gradient(h: Tensor, s: float) -> Tensor:
    """h itself, bit for bit, whose gradient is multiplied by s (OmniNFT, partial stop-gradient).

    Written out as sg(h) + s (h - sg(h)) the forward value would be the same only up to rounding, and in bf16 each of
    the three operations would be kept for the backward. h: any shape; s >= 0, 0 stops the gradient (to exact zeros).
    """
    out = h.view_as(h)
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * s)
    return out


@dataclass(frozen=True)
class SurgeryRange:
    """Blocks [start, stop) and the factor s on the gradient that crosses there.

    Two ints are block numbers. If either is a float, both are fractions of depth in [0, 1] (an int 0 or 1 is then
    the beginning or the end), so that a schedule carries over to another depth.
    """

    start: int | float
    stop: int | float
    scale: float

    @property
    def is_fraction(self) -> bool:
        return isinstance(self.start, float) or isinstance(self.stop, float)


# OmniNFT's schedule for LTX-2, the same as fractions of depth, and written out block by block.
DEFAULT_FRACTIONS: tuple[SurgeryRange, ...] = (
    SurgeryRange(0.0, 1 / 48, 0.0),
    SurgeryRange(1 / 48, 11 / 48, 0.1),
    SurgeryRange(40 / 48, 1.0, 0.3),
)
REFERENCE_SCHEDULE_48: tuple[float, ...] = (0.0,) + (0.1,) * 10 + (1.0,) * 29 + (0.3,) * 8


def surgery_schedule(num_blocks: int, spec: Sequence[SurgeryRange]) -> list[float]:
    """The factor s of every block; 1 where no range says otherwise.

    A fraction f of depth is the boundary round(f * num_blocks). A fractional range that rounds to nothing is widened
    to one block and pushes the ranges after it on: block 0 of 48 stays block 0 of 8, it does not vanish.

    Args:
        num_blocks: depth of the transformer, >= 1.
        spec: ranges in any order.

    Returns:
        num_blocks factors >= 0.

    Raises:
        OmniNFTError: ranges that overlap, leave the depth or are empty, a negative or non-finite factor, or a model
            too shallow to give every fractional range a block.
    """
    schedule = [1.0] * num_blocks
    taken: list[SurgeryRange | None] = [None] * num_blocks
    previous: tuple[SurgeryRange, int] | None = None
    for piece in sorted(spec, key=lambda r: r.start if r.is_fraction else r.start / num_blocks):
        _check_range(piece, num_blocks)
        start, stop = int(piece.start), int(piece.stop)
        if piece.is_fraction:
            start, stop = round(piece.start * num_blocks), round(piece.stop * num_blocks)
            if previous is not None:
                before, end = previous
                if piece.start < before.stop:
                    raise OmniNFTError(f"surgery ranges overlap: {before} and {piece}")
                start = max(start, end)
            stop = max(stop, start + 1)
            previous = piece, stop
        if stop > num_blocks:
            raise OmniNFTError(f"{num_blocks} blocks are too few to give {piece} one; name the blocks instead")
        for block in range(start, stop):
            if taken[block] is not None:
                raise OmniNFTError(f"surgery ranges overlap at block {block}: {taken[block]} and {piece}")
            taken[block], schedule[block] = piece, float(piece.scale)
    return schedule


def _check_range(piece: SurgeryRange, num_blocks: int) -> None:
    end = 1 if piece.is_fraction else num_blocks
    if not 0 <= piece.start < piece.stop <= end:
        unit = "fractions of depth" if piece.is_fraction else "block numbers"
        raise OmniNFTError(f"{piece}: expected {unit} with 0 <= start < stop <= {end}")
    if not (math.isfinite(piece.scale) and piece.scale >= 0):
        raise OmniNFTError(f"{piece}: scale must be finite and not negative")


@dataclass(eq=False)
class _Hook:
    """One module where gradient crosses, as it was when the hook was set, and how often it was scaled there."""

    surgery: GradientSurgery
    site: CrossSite
    path: str  # below the block, such as audio_to_video_attn.to_k
    module: nn.Module
    scale: float = 1.0
    count: int = 0

    def __str__(self) -> str:
        return f"block {self.site.block} ({self.path})"

    def cross(self, h: Tensor, key: Tensor) -> Tensor:
        """h, whose gradient will ask `read_scale`."""
        if self.scale == 1:
            return h
        if not h.requires_grad:
            self.count += self.surgery.active
            return h
        # Also while disabled, so that what is recorded does not depend on when the caller enables.
        return _cross(h, key)

    def read_scale(self) -> float:
        """The factor on the gradient that is on its way here."""
        if not self.surgery.active:
            return 1.0
        self.count += 1
        return self.scale


_HOOKS: WeakValueDictionary[int, _Hook] = WeakValueDictionary()
_KEYS = itertools.count()


def _crossing(module: nn.Module, h: Tensor) -> Tensor:
    """h on its way through a hooked module. Compiled blocks share one graph, so nothing of one hook is read there."""
    if not torch.is_grad_enabled():
        return h
    key: Tensor = module.surgery_key  # type: ignore[assignment]
    if torch.compiler.is_compiling():
        return _cross(h, key) if h.requires_grad else h
    hook: _Hook = module.surgery_hook  # type: ignore[assignment]
    return hook.cross(h, key)


# One function for all modules, because compilers guard on which function a hook is.
def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("encoder_hidden_states") is not None:
        crossing = _crossing(module, kwargs["encoder_hidden_states"])
        return args, {**kwargs, "encoder_hidden_states": crossing}
    if len(args) > 1 and args[1] is not None:
        return (args[0], _crossing(module, args[1]), *args[2:]), kwargs
    raise OmniNFTError(f"{module.surgery_hook} was called without encoder_hidden_states: nothing crosses there")


def _after_projection(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return _crossing(module, output)


class GradientSurgery:
    """Hooks that scale what crosses between the streams, while enabled.

    Every site is hooked; a factor of 1 costs nothing, and the factors can be set anew before each iteration
    (`set_schedules`). The hooks put an identity into the graph whenever gradients are recorded; its factor is looked
    up in the backward. So `enable` must be in force during the *backward*, and one forward graph can serve two losses:

        with surgery:
            video_loss.backward(retain_graph=True)
        audio_loss.backward()

    which is scope `video_loss_only`. The default scope, OmniNFT's, is one backward of the sum: it also scales the
    audio loss where it crosses A2V on an indirect way (audio <- V2A <- video <- A2V <- audio). Gradients that do not
    cross stay bit-equal. Under torch.no_grad nothing happens, so rollouts and the old and reference predictions are
    untouched.

    A crossing counts as fired when a gradient was scaled there (or, with surgery enabled in the forward, when what
    enters carries no gradient, so that there is nothing to scale). Call `check_fired` after the first backward: hooks
    that a wrapper dropped, an adapter that replaced a hooked projection, a compiled graph that runs without them, or
    a backward outside `with surgery` are all silent otherwise.

    Args:
        sites: `policy.sites`. Wrappers that pass attributes on (compile, FSDP, checkpointing) are fine. Add adapters
            first, and set the hooks before a compiled block runs for the first time.
        video_schedule: one factor a block, for audio hidden states on their way into the video stream (A2V).
        audio_schedule: the same for video hidden states into the audio stream (V2A); None leaves V2A alone.
        target: `input` scales at the hidden state that enters the attention: `to_k` and `to_v` keep their own full
            gradient (OmniNFT's reference code). `projection` scales at the outputs of `to_k` and `to_v`, so theirs
            shrinks too.

    Raises:
        OmniNFTError: a schedule of the wrong length or with a negative factor, a block without the modules, or one
            where another surgery acts.
    """

    def __init__(
        self,
        sites: Sequence[CrossSite],
        video_schedule: Sequence[float],
        audio_schedule: Sequence[float] | None = None,
        target: Target = "input",
    ) -> None:
        if target not in get_args(Target):
            raise OmniNFTError(f"surgery target is {target!r}, expected one of {get_args(Target)}")
        self.active = False
        self.num_blocks = len({site.block for site in sites})
        self._hooks: list[_Hook] = []
        for site in sites:
            paths = [site.attention]
            if target == "projection":
                paths = [f"{site.attention}.{name}" for name in site.projections]
            self._hooks += [_Hook(self, site, path, site.find(path)) for path in paths]
        self.set_schedules(video_schedule, audio_schedule)
        self._handles: list[Any] = [self._attach(hook, target) for hook in self._hooks]

    def set_schedules(self, video_schedule: Sequence[float], audio_schedule: Sequence[float] | None = None) -> None:
        """New factors for A2V and V2A (None: 1 everywhere), in force from the next forward on.

        Raises:
            OmniNFTError: a schedule of the wrong length, or a factor that is negative or not finite.
        """
        schedules = {"a2v": video_schedule, "v2a": audio_schedule}
        for direction, schedule in schedules.items():
            if schedule is None:
                continue
            if len(schedule) != self.num_blocks:
                raise OmniNFTError(f"{direction}: a schedule of {len(schedule)} factors for {self.num_blocks} blocks")
            for block, scale in enumerate(schedule):
                if not (math.isfinite(scale) and scale >= 0):
                    raise OmniNFTError(f"{direction}, block {block}: factor {scale} must be finite and not negative")
        for hook in self._hooks:
            chosen = schedules[hook.site.direction]
            hook.scale = 1.0 if chosen is None else float(chosen[hook.site.block])

    def _attach(self, hook: _Hook, target: Target) -> Any:
        if hasattr(hook.module, "surgery_hook"):
            raise OmniNFTError(f"{hook}: another gradient surgery acts there already; close it first")
        key = next(_KEYS)
        _HOOKS[key] = hook.module.surgery_hook = hook  # type: ignore[assignment]
        hook.module.surgery_key = torch.tensor(key)  # no buffer: it stays on the CPU and out of states
        if target == "input":
            return hook.module.register_forward_pre_hook(_before_attention, with_kwargs=True)
        return hook.module.register_forward_hook(_after_projection)

    def enable(self) -> None:
        """Scale in every backward from now on."""
        self.active = True

    def disable(self) -> None:
        """Leave gradients alone from now on."""
        self.active = False

    def __enter__(self) -> Self:
        self.enable()
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    @property
    def _cutting(self) -> list[_Hook]:
        return [hook for hook in self._hooks if hook.scale != 1]

    @property
    def bound(self) -> int:
        """Number of blocks whose factor is not 1."""
        return len({hook.site.block for hook in self._cutting})

    @property
    def counts(self) -> dict[int, int]:
        """How often gradient was scaled at each block whose factor is not 1: the least of its hooks."""
        blocks = sorted({hook.site.block for hook in self._cutting})
        return {block: min(h.count for h in self._cutting if h.site.block == block) for block in blocks}

    @property
    def fired(self) -> set[int]:
        """Blocks at which every hook whose factor is not 1 has fired since the last reset."""
        return {block for block, count in self.counts.items() if count}

    def reset(self) -> None:
        """Forget what has fired."""
        for hook in self._hooks:
            hook.count = 0

    def check_fired(self) -> None:
        """Raise unless every hook that the schedules name is still in place and has fired since the last reset.

        Raises:
            OmniNFTError: it names the blocks and modules.
        """
        replaced = [str(hook) for hook in self._cutting if hook.site.find(hook.path) is not hook.module]
        if replaced:
            raise OmniNFTError(
                f"gradient surgery is bound to modules that were replaced since: {', '.join(replaced)}. "
                "Add adapters and wrappers first."
            )
        silent = [str(hook) for hook in self._cutting if not hook.count]
        if silent:
            raise OmniNFTError(
                f"gradient surgery names {self.bound} blocks but did not fire at {', '.join(silent)}: the hooks were "
                "not called, surgery was not enabled during the backward, or no gradient crosses there."
            )

    def close(self) -> None:
        """Remove the hooks. Graphs recorded before are no longer scaled."""
        self.disable()
        for handle in self._handles:
            handle.remove()
        for hook in self._hooks:
            del hook.module.surgery_hook, hook.module.surgery_key
        self._handles.clear()
        self._hooks.clear()
