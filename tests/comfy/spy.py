"""What a model's own attention layers are given while it samples, beside what a recording makes of them."""

from __future__ import annotations

from collections import defaultdict

import torch
from einops import rearrange

from fmn_core.attention.recorder import AttentionRecording

PROMPT = "a neon drawing of a cat"


class Spy:
    """The stock attention in the layers' place, which keeps softmax(Q K^T / sqrt(d)) of one chunk of every forward, in
    double precision: what any recording must be the mean of."""

    def __init__(self, model, chunk):
        from comfy.ldm.modules.attention import optimized_attention

        self.model, self.chunk, self.maps = model.clone(), chunk, defaultdict(list)
        for name, _ in model.model.diffusion_model.named_modules():
            if name.endswith("attn2"):
                part, number, *_, index = name.removesuffix(".attn2").split(".")
                place = (part.split("_")[0], 0 if part == "middle_block" else int(number), int(index))

                def replace(q, k, v, extra, name=name):
                    self.keep(name, q, k, extra)
                    return optimized_attention(q, k, v, extra["n_heads"])

                self.model.set_model_attn2_replace(replace, *place)

    def keep(self, name, q, k, extra):
        for i in self.chunk(extra):
            rows = slice(i * len(q) // len(extra["cond_or_uncond"]), (i + 1) * len(q) // len(extra["cond_or_uncond"]))
            split = [rearrange(x[rows].double(), "b n (h d) -> b h n d", h=extra["n_heads"]) for x in (q, k)]
            scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
            self.maps[name].append((scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(1))

    def mean(self, name, columns):
        """The mean map [B, N, T], of a prompt that may have been repeated to a common length."""
        total = torch.stack(self.maps[name]).mean(0)
        return total.unflatten(-1, (-1, columns)).sum(-2)


def positive(extra):
    return [i for i, kind in enumerate(extra["cond_or_uncond"]) if kind == 0]


def assert_same(recording: AttentionRecording, spy: Spy, columns: int):
    """The recorded maps are the spy's to 1e-5, and their columns sum to 1."""
    assert set(recording.layers) == set(spy.maps) and recording.layers
    for name in recording.layers:
        map = rearrange(recording.map(name).mean(1), "b h w t -> b (h w) t")
        assert torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
        assert (map.double() - spy.mean(name, columns)).abs().max() < 1e-5
