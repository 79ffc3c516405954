"""A linear autoencoder in the layout of SD1's KL autoencoder, in place of the small one, whose layers do not fit into it.

A latent stands for 8 x 8 pixels, and what a linear map makes of it is their mean colour: one convolution, fitted by least
squares to what the small autoencoder makes of pictures, takes 3 x 3 latents to it, and another 3 x 3 mean colours to a
latent. All else passes on what it is given: residual blocks and attention whose last convolution is zero, convolutions with
a 1 in their middle, and on the way down the mean of 2 x 2.

The last convolution stands behind a GroupNorm and a SiLU, which are not linear. A group of n channels x, -x, B, -B and zeros
has the mean 0 and the variance (2 x^2 + 2 B^2) / n, which is 2 B^2 / n for a B far above x: weights of that root undo the
norm, and silu(x) - silu(-x) = x undoes the SiLU.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fmn_core.hosts.webui.taesd import TAESD

PICTURE = Path(__file__).parents[1] / "sheets/related.jpg"  # fitted on
WIDTHS = (128, 256, 512, 512)  # at 1, 1/2, 1/4 and 1/8 of the picture's size
LATENTS, COLOURS, GROUPS = 4, 3, 32
CELL = 8  # pixels along a latent's side
SIDE = 640  # pixels of the picture that are enough to fit on
LARGE = 64.0  # B
LOG_VARIANCE = -20.0  # of the encoder's Gaussian: no noise to speak of


def linear_autoencoder(small: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by SD1's names; `small` are those of a TAESD."""
    colours, latents = colours_and_latents(small)
    layers = Layers()
    decoder(layers, *fitted(latents, colours))
    encoder(layers, *fitted(colours, latents))
    layers.convolution("quant_conv", 2 * LATENTS, 2 * LATENTS, size=1)
    layers.convolution("post_quant_conv", LATENTS, LATENTS, size=1)
    return layers.weights


def colours_and_latents(small: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean colours [1, 3, h, w] in -1..1 of a picture's 8 x 8 pixels, and a TAESD's latents [1, 4, h, w] of it."""
    taesd = TAESD().eval()
    taesd.load_state_dict(small)
    pixels = torch.from_numpy(np.array(Image.open(PICTURE).convert("RGB"))).float().movedim(-1, 0)[None] / 127.5 - 1
    pixels = pixels[..., :SIDE, :SIDE]
    with torch.no_grad():
        return F.avg_pool2d(pixels, CELL), taesd.encode(pixels)


def fitted(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [O, I, 3, 3] and bias [O] of the convolution that takes inputs [1, I, h, w] nearest to outputs [1, O, h, w]."""
    columns = F.unfold(inputs, 3, padding=1)[0].T.double()
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=columns.dtype)], 1)
    solution = torch.linalg.lstsq(columns, outputs[0].flatten(1).T.double()).solution.float()
    return solution[:-1].T.reshape(outputs.shape[1], inputs.shape[1], 3, 3), solution[-1]


class Layers:
    """Weights and biases of layers that pass on what they are given, by name."""

    def __init__(self):
        self.weights: dict[str, Tensor] = {}

    def convolution(self, name: str, outputs: int, inputs: int, size: int = 3, kernel: Tensor | None = None) -> None:
        """Gives each channel of the output the input's of the same number, through `kernel`, or with None as it is."""
        weight = torch.zeros(outputs, inputs, size, size)
        if kernel is None:
            kernel = torch.zeros(size, size)
            kernel[size // 2, size // 2] = 1
        same = torch.arange(min(outputs, inputs))
        weight[same, same] = kernel
        self.add(name, weight, torch.zeros(outputs))

    def zero(self, name: str, outputs: int, inputs: int, size: int = 3) -> None:
        self.add(name, torch.zeros(outputs, inputs, size, size), torch.zeros(outputs))

    def norm(self, name: str, channels: int) -> None:
        self.add(name, torch.ones(channels), torch.zeros(channels))

    def add(self, name: str, weight: Tensor, bias: Tensor) -> None:
        self.weights |= {f"{name}.weight": weight, f"{name}.bias": bias}

    def residual(self, name: str, inputs: int, outputs: int) -> None:
        """A residual block; with fewer channels out than in it drops the last."""
        self.norm(f"{name}.norm1", inputs)
        self.convolution(f"{name}.conv1", outputs, inputs)
        self.norm(f"{name}.norm2", outputs)
        self.zero(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.convolution(f"{name}.nin_shortcut", outputs, inputs, size=1)

    def middle(self, name: str, channels: int) -> None:
        for each in ("block_1", "block_2"):
            self.residual(f"{name}.{each}", channels, channels)
        self.norm(f"{name}.attn_1.norm", channels)
        for each in "qkv":
            self.convolution(f"{name}.attn_1.{each}", channels, channels, size=1)
        self.zero(f"{name}.attn_1.proj_out", channels, channels, size=1)

    def norm_undone(self, name: str, channels: int) -> list[int]:
        """A norm whose effect on groups x, -x, B, -B its weights undo; returns the channels of the x."""
        size = channels // GROUPS
        starts = [colour * size for colour in range(COLOURS)]
        weight = torch.ones(channels)
        for start in starts:
            weight[start : start + 2] = LARGE * math.sqrt(2 / size)
            weight[start + 2 : start + 4] = 0
        self.add(name, weight, torch.zeros(channels))
        return starts

    def first(self, name: str, outputs: int, weight: Tensor, bias: Tensor, starts: list[int]) -> None:
        """A convolution that writes x, -x, B and -B, x being the outputs of `weight` and `bias`, at these channels."""
        whole, constant = torch.zeros(outputs, *weight.shape[1:]), torch.zeros(outputs)
        for start, row, value in zip(starts, weight, bias, strict=True):
            whole[start], whole[start + 1] = row, -row
            constant[start], constant[start + 1], constant[start + 2], constant[start + 3] = value, -value, LARGE, -LARGE
        self.add(name, whole, constant)

    def last(self, name: str, inputs: int, weight: Tensor, bias: Tensor, starts: list[int]) -> None:
        """A convolution of the x whose silu(x) and silu(-x) are at these channels."""
        whole = torch.zeros(len(weight), inputs, *weight.shape[2:])
        for colour, start in enumerate(starts):
            whole[:, start], whole[:, start + 1] = weight[:, colour], -weight[:, colour]
        self.add(name, whole, bias)


def pick(count: int) -> Tensor:
    """The weight [count, count, 3, 3] of a convolution that gives back its input."""
    weight = torch.zeros(count, count, 3, 3)
    weight[:, :, 1, 1] = torch.eye(count)
    return weight


def decoder(layers: Layers, weight: Tensor, bias: Tensor) -> None:
    """Latents to colours in its first layer, which the rest makes larger."""
    starts = layers.norm_undone("decoder.norm_out", WIDTHS[0])
    layers.first("decoder.conv_in", WIDTHS[-1], weight, bias, starts)
    layers.middle("decoder.mid", WIDTHS[-1])
    inputs = WIDTHS[-1]
    for level in reversed(range(len(WIDTHS))):
        for number in range(3):
            layers.residual(f"decoder.up.{level}.block.{number}", inputs, WIDTHS[level])
            inputs = WIDTHS[level]
        if level:
            layers.convolution(f"decoder.up.{level}.upsample.conv", inputs, inputs)
    layers.last("decoder.conv_out", inputs, pick(COLOURS), torch.zeros(COLOURS), starts)


def encoder(layers: Layers, weight: Tensor, bias: Tensor) -> None:
    """Pixels to colours of 8 x 8 in all its layers but the last, which makes latents of them."""
    starts = layers.norm_undone("encoder.norm_out", WIDTHS[-1])
    layers.first("encoder.conv_in", WIDTHS[0], pick(COLOURS), torch.zeros(COLOURS), starts)
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 1 / 4  # SD1 pads on the right and below
    inputs = WIDTHS[0]
    for level, outputs in enumerate(WIDTHS):
        for number in range(2):
            layers.residual(f"encoder.down.{level}.block.{number}", inputs, outputs)
            inputs = outputs
        if level < len(WIDTHS) - 1:
            layers.convolution(f"encoder.down.{level}.downsample.conv", inputs, inputs, kernel=mean)
    layers.middle("encoder.mid", inputs)
    moments = torch.cat([weight, torch.zeros_like(weight)])
    layers.last("encoder.conv_out", inputs, moments, torch.cat([bias, torch.full_like(bias, LOG_VARIANCE)]), starts)
