"""Properties of the adapters."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fmn_core.host import CrossAttention
from fmn_core.lora.layers import CrossAttentionLoRA, balanced


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8, bias=False)
        self.to_k, self.to_v = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Identity())


def make(rank=2, seed=0, matrices=("to_q", "to_k", "to_v", "to_out")):
    torch.manual_seed(0)
    layers = {"a.attn2": CrossAttention("a.attn2", Attention(), 2, "down")}
    return layers, CrossAttentionLoRA(layers, matrices, rank, torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(out=st.integers(1, 9), inner=st.integers(1, 9), rank=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_balancing_keeps_the_product_and_the_rank(out, inner, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)
    new_up, new_down = balanced(up, down)
    assert new_up.shape == up.shape and new_down.shape == down.shape
    assert torch.allclose(new_up @ new_down, up @ down, atol=1e-4)
    assert torch.allclose(new_up.norm(dim=0), new_down.norm(dim=1), atol=1e-4)


def test_new_adapters_change_nothing_and_trained_ones_add_their_delta():
    layers, lora = make()
    module, x = layers["a.attn2"].module, torch.randn(3, 6)
    base = module.to_k(x)
    with lora.attached():
        assert torch.equal(module.to_k(x), base)
        nn.init.normal_(lora.adapter("a.attn2", "to_k").up)
        changed = module.to_k(x)
    adapter = lora.adapter("a.attn2", "to_k")
    assert torch.allclose(changed, x @ (module.to_k.weight + adapter.up @ adapter.down).T, atol=1e-5)
    assert torch.equal(module.to_k(x), base)


def test_gradient_reaches_the_adapters_and_nothing_else():
    layers, lora = make()
    module = layers["a.attn2"].module.requires_grad_(False)
    with lora.attached():
        (module.to_out(module.to_q(torch.randn(2, 8))).sum() + module.to_k(torch.randn(2, 6)).sum()).backward()
    assert all(p.grad is None for p in module.parameters())
    assert lora.adapter("a.attn2", "to_q").up.grad is not None and lora.adapter("a.attn2", "to_out").up.grad is not None


def test_hooks_go_when_the_context_fails():
    layers, lora = make()
    try:
        with lora.attached():
            raise RuntimeError
    except RuntimeError:
        pass
    assert not any(m._forward_hooks for m in layers["a.attn2"].module.modules())


def test_same_seed_same_start():
    (_, one), (_, two), (_, other) = make(seed=1), make(seed=1), make(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
