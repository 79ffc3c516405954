"""What a prompt's words attended to: sums over forwards, kept inside a bound of memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import setting
from ..host import CrossAttention, Token
from ..log import logger
from .capture import attention_probabilities
from .frames import Box, Frame, Origin, halve, resized

MEGABYTE = 2**20
AT_ONCE = 8  # of so many parts of the memory, one is for the maps of the pixels at hand
FLOAT = 4  # bytes


@dataclass(frozen=True)
class RecordingConfig:
    """What of the attention is recorded, and in how much memory."""

    granularity: str = setting(
        "heads",
        "What is kept separate, besides layers and tokens. `heads`: each head, as DAAM needs it, and for the view per head. "
        "`steps`: each step, for the view `over_steps`. `mean`: neither, which needs the least memory.",
        choices=("heads", "steps", "mean"),
    )  # fmt: skip
    layers: str = setting(
        "all", "Which layers of the UNet: all, or those on the way down, in the middle, or on the way up.",
        choices=("all", "down", "mid", "up"),
    )  # fmt: skip
    start_percent: float = setting(
        0.0, "Where in the noise the recording begins, as in the host's own ranges of steps: 0 is pure noise.",
        min=0.0, max=1.0, step=0.01, advanced=True,
    )  # fmt: skip
    end_percent: float = setting(
        1.0, "Where in the noise the recording ends: 1 is the finished picture.", min=0.0, max=1.0, step=0.01, advanced=True
    )  # fmt: skip
    max_memory_mb: int = setting(
        256,
        "Megabytes that one recording may take. If that is not enough, steps or heads are merged, then the "
        "largest maps halved.",
        min=16, max=65536, advanced=True,
    )  # fmt: skip

    def chosen(self, layers: dict[str, CrossAttention]) -> dict[str, CrossAttention]:
        """Those of the layers that are recorded."""
        return {name: layer for name, layer in layers.items() if self.layers in ("all", layer.unet_block)}


@dataclass
class AttentionRecording:
    """What one prompt's words attended to while pictures were sampled.

    `tokens`: the prompt's T columns. `frames`: one for all steps, or several where steps are kept apart, each of `span`
    steps. `sizes`: layer -> (B, heads, height, width) of its forwards; `halved`: layer -> how many of these pixels a pixel
    of the map has along a side; `apart`: whether heads are. `origin`: who sampled it; `several`: whether it sampled several
    times, one after the other, of which this is the last. `earlier`: what other samplers have recorded, by their names.
    """

    text: str
    tokens: tuple[Token, ...]
    settings: RecordingConfig = field(default_factory=RecordingConfig)
    frames: list[Frame] = field(default_factory=list)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    halved: dict[str, int] = field(default_factory=dict)
    span: int = 1
    apart: bool = field(init=False)
    origin: Origin | None = None
    several: bool = False
    earlier: dict[str, AttentionRecording] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.apart = self.settings.granularity == "heads"

    def begin(self, origin: Origin | None = None) -> None:
        """Forgets what was recorded: a new sampling starts. What another sampler has recorded is kept in `earlier`."""
        self.several = origin is not None and origin == self.origin
        if origin and self.origin and origin.sampler != self.origin.sampler:
            self.earlier[self.origin.sampler] = copy.copy(self)
            self.earlier[self.origin.sampler].earlier = {}
            self.earlier.pop(origin.sampler, None)
        self.origin = origin
        self.frames, self.sizes, self.halved, self.span = [], {}, {}, 1
        self.apart = self.settings.granularity == "heads"

    def end(self) -> None:
        """Brings what was recorded to the CPU: the sampling is over."""
        if self.halved:
            logger.warning(
                "%d MB were too few for the attention maps of %d pictures: %d of %d layers are coarser, down to %d x %d. "
                "Raise `max_memory_mb`, record fewer pictures, or set `granularity` to `mean`.",
                self.settings.max_memory_mb, self.pictures, len(self.halved), len(self.layers),
                *min(frame.counts[layer].shape for frame in self.frames for layer in self.halved if layer in frame.counts),
            )  # fmt: skip
        for frame in self.frames:
            for table, layer in frame.tensors():
                table[layer] = table[layer].cpu()

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers, in the order of the forward."""
        return list(dict.fromkeys(layer for frame in self.frames for layer in frame.sums))

    @property
    def pictures(self) -> int:
        """How many pictures were recorded."""
        return self.sizes[self.layers[0]][0]

    def bytes(self) -> int:
        """What is kept."""
        return sum(table[layer].nbytes for frame in self.frames for table, layer in frame.tensors())

    @torch.no_grad()
    def add(
        self,
        layer: str,
        q: Tensor,
        k: Tensor,
        heads: int,
        size: tuple[int, int],
        *,
        step: int = 0,
        box: Box | None = None,
        pictures: int | None = None,
        first: int = 0,
        columns: int | None = None,
        names: Tensor | None = None,
    ) -> None:
        """Takes in one forward of one layer of this `size` (height, width): q [B, height * width, heads * d] and
        k [B, R * T, heads * d].

        A prompt that the host tiled R times to a common length comes back to its own: a column is the sum of its repeats.
        Where the host has put something behind it instead, `columns` are the prompt's; where another pack has changed it,
        so that k is [B, L, heads * d], `names` [B, L, T] says which column is which (attention.prompt_columns). A layer that
        runs for a part of the picture is told so by `box`. Of many `pictures`, some come at a time, from the number `first`
        on. The first size counts; a whole picture of another size is brought to it, a part left out.
        """
        height, width = size
        pictures, full = pictures or len(q), box or Box(height, width)
        sizes = (pictures, heads, full.height, full.width)
        known = self.sizes.setdefault(layer, sizes)
        same = known == sizes
        length = k.shape[1] if names is None else names.shape[2]
        if (columns or length) % len(self.tokens) or not same and (known[:2] != sizes[:2] or box):
            return
        room = self.settings.max_memory_mb * MEGABYTE
        frame = self.make_room(layer, step, room - room // AT_ONCE - q.nbytes - k.nbytes, q.device)
        side = self.halved.get(layer, 1) if same else 1
        sums, count = frame.sums[layer][first : first + len(q)], frame.counts[layer]
        maps = self.maps_of(q, k, heads, width, side=side, columns=columns, names=names)
        if same:
            y, x = full.top // side, full.left // side
            for part in maps:
                place = sums[:, :, y : y + part.shape[2], x : x + part.shape[3]]
                place += part[:, :, : place.shape[2], : place.shape[3]]
                y += part.shape[2]
            seen = count[full.top // side : y, x : x - (-width // side)]
        else:
            sums += resized(torch.cat([*maps], 2), *sums.shape[2:4])
            seen = count
        if first == 0:
            seen += 1

    def maps_of(
        self, q: Tensor, k: Tensor, heads: int, width: int, *, side: int, columns: int | None, names: Tensor | None
    ) -> Iterator[Tensor]:
        """The maps [B, H, rows, w, T] of some rows of pixels at a time, halved to pixels of this side."""
        row_bytes = 3 * FLOAT * len(q) * heads * width * k.shape[1]  # scores, probabilities, and these folded
        rows = max(self.settings.max_memory_mb * MEGABYTE // AT_ONCE // row_bytes // side, 1) * side
        for part in q.split(rows * width, 1):
            probabilities = attention_probabilities(part, k, heads)[..., :columns]
            if not self.apart:
                probabilities = probabilities.mean(1, keepdim=True)
            if names is not None:
                probabilities = probabilities @ names[:, None]
            maps = rearrange(probabilities, "b k (h w) t -> b k h w t", w=width)
            if maps.shape[-1] != len(self.tokens):
                maps = rearrange(maps, "b k h w (r t) -> b k h w r t", t=len(self.tokens)).sum(-2)
            yield halve(maps, side)

    def make_room(self, layer: str, step: int, room: int, device: torch.device) -> Frame:
        """The step's frame, with zeros for the layer where it has none; joins steps and halves maps until all fits."""
        pictures, heads, *full = self.sizes[layer]
        while True:
            frame = self.frame_of(step)
            if layer in frame.sums:
                return frame
            side = self.halved.get(layer, 1)
            size = (-(-full[0] // side), -(-full[1] // side))
            kept = heads if self.apart else 1
            need = FLOAT * size[0] * size[1] * (pictures * kept * len(self.tokens) + 1)
            if self.bytes() + need > room and self.shrink((layer, size)):
                continue
            frame.sums[layer] = torch.zeros(pictures, kept, *size, len(self.tokens), device=device)
            frame.counts[layer] = torch.zeros(size, device=device)
            return frame

    def frame_of(self, step: int) -> Frame:
        """The frame that a step belongs to."""
        first = step - step % self.span if self.settings.granularity == "steps" else 0
        for frame in self.frames:
            if frame.first == first:
                frame.last = max(frame.last, step)
                return frame
        self.frames.append(Frame(first, step))
        return self.frames[-1]

    def shrink(self, coming: tuple[str, tuple[int, int]]) -> bool:
        """Joins each two neighbouring frames; where there is one alone, its heads; and then halves the largest map, be it
        the coming one of this layer and size. False where nothing can be made smaller."""
        if len(self.frames) > 1:
            self.span *= 2
            joined: list[Frame] = []
            for frame in sorted(self.frames, key=lambda frame: frame.first):
                first = frame.first - frame.first % self.span
                if joined and joined[-1].first == first:
                    joined[-1].join(frame)
                else:
                    frame.first = first
                    joined.append(frame)
            self.frames = joined
            return True
        frame = self.frames[0]
        if self.apart:
            self.apart = False
            frame.sums = {layer: sums.mean(1, keepdim=True) for layer, sums in frame.sums.items()}
            return True
        sizes = {layer: tuple(count.shape) for layer, count in frame.counts.items()} | dict([coming])
        layer = max(sizes, key=lambda layer: sizes[layer][0] * sizes[layer][1])
        if sizes[layer] == (1, 1):
            return False
        self.halved[layer] = 2 * self.halved.get(layer, 1)
        if layer in frame.sums:
            frame.sums[layer] = halve(frame.sums[layer], 2)
            frame.counts[layer] = halve(frame.counts[layer][None, None, :, :, None], 2)[0, 0, :, :, 0]
        return True

    def map(self, layer: str, frame: int | None = None, columns: list[int] | slice = slice(None)) -> Tensor:
        """A layer's mean map [B, H, h, w, T] over all steps or those of one frame, of all or some columns; H = 1 unless
        heads are apart. Columns sum to 1 wherever the prompt was used, less what went to columns that are none of its own,
        and are 0 elsewhere."""
        frames = self.frames if frame is None else self.frames[frame : frame + 1]
        there = [frame for frame in frames if layer in frame.sums]
        if not there:  # another pack has left the layer out of these steps
            return torch.zeros_like(self.map(layer, columns=columns))
        count = reduce(torch.add, (frame.counts[layer] for frame in there))
        return reduce(torch.add, (frame.sums[layer][..., columns] for frame in there)) / count.clamp(min=1e-12)[:, :, None]

    def mass(self) -> Tensor:
        """Each column's share of the attention [B, T]: a mean over layers, heads and the pixels that the prompt is for."""
        layers = []
        for name in self.layers:
            there = [frame for frame in self.frames if name in frame.sums]
            seen = reduce(torch.add, (frame.counts[name] for frame in there))
            if seen.min() == seen.max():
                part = reduce(torch.add, (frame.sums[name].sum((2, 3)) for frame in there)) / seen.sum()
            else:
                part = self.map(name)[:, :, seen > 0].mean(2)
            layers.append(part.mean(1).cpu())
        return torch.stack(layers).mean(0).nan_to_num()  # a model that overflows in fp16 attends to nothing in particular

    def heat_maps(
        self, columns: list[int], layers: list[str] | None = None, frame: int | None = None, head: int | None = None
    ) -> Tensor:
        """Those columns of DAAM's global heat map, [B, columns, h, w] on the CPU, of the largest layer's size: the heads of
        every layer up-sampled bicubically, clamped at zero, averaged (Tang et al., arXiv 2210.04885, section 3). Of all
        layers, steps and heads, or of some; heads that are joined are clamped together."""
        names = self.layers if layers is None else layers
        maps = [self.map(name, frame, columns).cpu() for name in names]
        height, width = max((map.shape[2:4] for map in maps), key=lambda size: size[0] * size[1])
        heat, heads = torch.zeros(()), 0
        for name, map in zip(names, maps, strict=True):
            map = map if head is None else map[:, head : head + 1]
            count = self.sizes[name][1] if head is None else 1
            large = F.interpolate(rearrange(map, "b k h w t -> b (k t) h w"), (height, width), mode="bicubic").clamp(min=0)
            heat = heat + rearrange(large, "b (k t) h w -> b k t h w", t=len(columns)).mean(1) * count
            heads += count
        return heat / heads
