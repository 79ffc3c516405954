"""The closed form against slow, independent computations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.erasure.solve import EditObjective, leading_directions, second_moment, solve

WIDTH = 12


def problem(seed: int, fixed: int = 2):
    """Columns [40, 12], targets, A, an orthonormal basis of what is fixed."""
    generator = torch.Generator().manual_seed(seed)
    x, y, p = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (40, 40, 60))
    basis = torch.linalg.qr(torch.randn(WIDTH, fixed, generator=generator, dtype=torch.float64))[0]
    return x, y, second_moment(p) + 0.1 * torch.eye(WIDTH, dtype=torch.float64), basis


def objective(M, x, y, A):
    return ((x + x @ M.T - y).square().sum(1).mean() + (M @ A @ M.T).trace()).item()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 6))
def test_full_rank_is_the_least_squares_of_all_equations_stacked(seed, fixed):
    x, y, A, basis = problem(seed, fixed)
    up, down = solve(EditObjective.of([(x, y)]), A, basis, WIDTH)
    free = torch.eye(WIDTH, dtype=torch.float64) - basis @ basis.T
    rows = torch.cat([x @ free / len(x) ** 0.5, torch.linalg.cholesky(A).T @ free])
    wanted = torch.cat([(y - x) / len(x) ** 0.5, torch.zeros_like(A)])
    M = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T @ free
    assert torch.allclose(up @ down, M, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_of_a_rank_nothing_is_better(seed, rank):
    """Against alternating least squares from several random starts."""
    x, y, A, _ = problem(seed)
    none = torch.zeros(WIDTH, 0, dtype=torch.float64)
    up, down = solve(EditObjective.of([(x, y)]), A, none, rank)
    assert up.shape == (WIDTH, rank) and down.shape == (rank, WIDTH)
    ours = objective(up @ down, x, y, A)
    gram, cross = second_moment(x) + A, (y - x).T @ x / len(x)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        left = torch.randn(WIDTH, rank, generator=generator, dtype=torch.float64)
        for _ in range(300):
            right = torch.linalg.solve(left.T @ left, left.T @ cross) @ torch.linalg.inv(gram)
            left = cross @ right.T @ torch.linalg.inv(right @ gram @ right.T)
        assert ours <= objective(left @ right, x, y, A) + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, WIDTH))
def test_what_is_fixed_does_not_move(seed, fixed, rank):
    x, y, A, basis = problem(seed, fixed)
    up, down = solve(EditObjective.of([(x, y)]), A, basis, rank)
    assert (up @ (down @ basis)).abs().max() < 1e-10


def test_two_concepts_are_the_sum_of_their_moments():
    (x, y, _, _), (v, w, _, _) = problem(0), problem(1)
    both = EditObjective.of([(x, y), (v[:3], w[:3])])
    d, v, e = y - x, v[:3], w[:3] - v[:3]
    assert torch.allclose(both.gram, x.T @ x / len(x) + v.T @ v / 3)
    assert torch.allclose(both.cross, d.T @ x / len(x) + e.T @ v / 3)


def test_a_concept_that_is_its_own_target_stays():
    x, _, A, basis = problem(0)
    up, down = solve(EditObjective.of([(x, x)]), A, basis, 4)
    assert (up @ down).abs().max() < 1e-12


def test_leading_directions_span_what_they_come_from():
    x = problem(0)[0][:5]
    basis = leading_directions(x, 1e-6)
    assert basis.shape == (WIDTH, 5) and torch.allclose(basis.T @ basis, torch.eye(5, dtype=x.dtype))
    assert torch.allclose(x @ basis @ basis.T, x)
    heavy = torch.cat([100 * x[:1], x])
    (direction,) = leading_directions(heavy, 0.1).T
    assert torch.allclose((direction @ x[0]).abs(), x[0].norm(), rtol=1e-3)
