"""The losses against slow computations written from the formulas: per head, per pixel, per token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.attention.capture import attention_probabilities
from fmn_core.training.losses import attention_resteering_loss, joint_norm_loss, predicted_x0, visual_denoising_loss


def slow_resteering(q, k, heads, columns, region):
    """Loss, dL/dq and dL/dk of sum A^2 over the columns, weighted by pixel, in Python loops and float64.

    With S = q k^T / sqrt(d), A = softmax(S) and L = sum_ij m_i c_j A_ij^2:
    dL/dS_ij = 2 m_i A_ij (c_j A_ij - sum_k c_k A_ik^2).
    """
    batch, pixels, width = q.shape
    d = width // heads
    loss, dq, dk = 0.0, np.zeros_like(q), np.zeros_like(k)
    for b in range(batch):
        for h in range(heads):
            channels = range(h * d, (h + 1) * d)
            for i in range(pixels):
                scores = [sum(q[b, i, c] * k[b, j, c] for c in channels) / math.sqrt(d) for j in range(k.shape[1])]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                attention = [w / sum(weights) for w in weights]
                inner = sum(columns[b, j] * a * a for j, a in enumerate(attention))
                loss += region[b, i] * inner / batch
                for j, a in enumerate(attention):
                    ds = 2 * region[b, i] * a * (columns[b, j] * a - inner) / batch
                    for c in channels:
                        dq[b, i, c] += ds * k[b, j, c] / math.sqrt(d)
                        dk[b, j, c] += ds * q[b, i, c] / math.sqrt(d)
    return loss, dq, dk


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.integers(1, 4)),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_resteering_loss_and_gradient_equal_the_slow_computation(shape, masked, seed):
    batch, heads, pixels, tokens, d = shape
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(batch, pixels, heads * d)) * 2, random.normal(size=(batch, tokens, heads * d)) * 2
    columns = random.random((batch, tokens)) < 0.5
    region = random.random((batch, pixels)) if masked else np.ones((batch, pixels))
    q_t, k_t = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (q, k))
    regions = [torch.tensor(region, dtype=torch.float32)] if masked else None
    maps = [attention_probabilities(q_t, k_t, heads)]
    loss = attention_resteering_loss(maps, torch.tensor(columns), regions)
    loss.backward()

    expected, dq, dk = slow_resteering(q, k, heads, columns, region)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(q_t.grad, dq, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(k_t.grad, dk, rtol=1e-3, atol=1e-5)


def test_layers_add_up():
    maps = [torch.rand(1, 2, n, 7) for n in (4, 16)]
    columns = torch.tensor([[False, True, False, True, False, False, False]])
    parts = [attention_resteering_loss([A], columns) for A in maps]
    assert torch.isclose(attention_resteering_loss(maps, columns), sum(parts))


def test_predicted_x0_undoes_the_noising():
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    a = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None]
    assert torch.allclose(predicted_x0(a.sqrt() * x0 + (1 - a).sqrt() * noise, noise, a.flatten()), x0, atol=1e-5)


def test_visual_denoising_loss_equals_the_formula_pixel_by_pixel():
    x_t, epsilon, without = (torch.randn(2, 4, 3, 3) for _ in range(3))
    alpha_bar = torch.tensor([0.2, 0.7])
    total = 0.0
    for b in range(2):
        for c in range(4):
            for y in range(3):
                for x in range(3):
                    a = alpha_bar[b].item()
                    estimate = (x_t[b, c, y, x].item() - math.sqrt(1 - a) * epsilon[b, c, y, x].item()) / math.sqrt(a)
                    total += (estimate - without[b, c, y, x].item()) ** 2
    assert visual_denoising_loss(x_t, epsilon, alpha_bar, without).item() == pytest.approx(total / 72, rel=1e-5)


def test_where_nothing_counts_the_joint_norm_has_a_gradient_of_nought():
    maps = [torch.rand(1, 2, n, 5, requires_grad=True) for n in (4, 9)]
    nowhere = [torch.zeros(1, n) for n in (4, 9)]
    joint_norm_loss(maps, torch.ones(1, 5, dtype=torch.bool), nowhere).backward()
    assert not any(A.grad.any() or A.grad.isnan().any() for A in maps)
