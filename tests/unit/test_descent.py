"""A training step: what half precision would lose, what overflows, and what a step that cannot be taken leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.errors import ForgetError
from fmn_core.training.checkpoint import State
from fmn_core.training.loop import HALVINGS, STEADY, Descent, settled
from fmn_core.training.memory import AdaptiveCheckpointing

HOST = SimpleNamespace(check_interrupt=lambda: None, recomputes=False)


def descent_of(values, scale=2.0**16, rate=0.1, **options):
    """A descent of one parameter by plain gradient steps."""
    parameter = torch.tensor(values, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=rate)
    state = State([parameter], optimizer, torch.Generator().manual_seed(0), most_scale=scale)
    return Descent(AdaptiveCheckpointing(HOST), state, **options), parameter


def half_loss(parameter, size):
    """A sum whose gradient by the parameter, `size` each, passes through half precision."""
    return (parameter.half().float() * size).sum()


@settings(deadline=None)
@given(st.integers(-20, 20), st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=5))
def test_in_single_precision_every_scale_gives_the_same_step(power, values):
    def trained(scale):
        descent, parameter = descent_of(values, scale)
        for _ in range(3):
            descent.take(lambda differentiate: differentiate((parameter.sin() * 3 + parameter.square()).sum()))
        return parameter.detach()

    assert torch.equal(trained(1.0), trained(2.0**power))


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e3, 6e4])
def test_a_gradient_of_any_size_passes_half_precision(size):
    descent, parameter = descent_of([1.0, 1.0], rate=1.0, max_norm=None)
    descent.take(lambda differentiate: differentiate(half_loss(parameter, size)))
    assert descent.state.figures["scale"][0] * size < 65520
    moved = (1 - parameter.detach()).double()
    assert torch.allclose(moved, torch.full((2,), size).double(), rtol=1e-3, atol=6e-8)  # of 1 - size in single
    plain = torch.tensor([1.0], requires_grad=True)
    assert size > 1e-8 or not torch.autograd.grad(half_loss(plain, size), plain)[0].any(), "nothing to lose"


def test_a_step_that_overflows_is_taken_again_with_the_same_random_numbers():
    descent, parameter = descent_of([1.0])
    drawn = []

    def step(differentiate):
        drawn.append(torch.rand(1, generator=descent.state.generator).item())
        return differentiate(half_loss(parameter, 8.0))

    descent.take(step)
    assert len(drawn) == 5 and len({*drawn}) == 1 and descent.state.figures["scale"][0] == 2.0**12
    descent.take(step)
    assert len(drawn) == 6 and drawn[5] != drawn[0]


def test_the_scale_comes_back_and_goes_no_further_and_is_kept():
    descent, parameter = descent_of([1.0], rate=0.0)
    scale, seen = descent.state.figures["scale"], []
    for size in [8.0, *[0.5] * (5 * STEADY)]:
        descent.take(lambda differentiate, size=size: differentiate(half_loss(parameter, size)))
        seen.append(scale[0])
    assert seen[0] == 2.0**12 and seen[STEADY - 2] == 2.0**12 and seen[STEADY - 1] == 2.0**13 and max(seen) == 2.0**16
    other = descent_of([1.0])[0].state
    scale[0] = 2.0**5
    other.load(descent.state.stored())
    assert other.figures["scale"] == scale


def test_what_is_no_number_at_any_scale_is_not_followed():
    descent, parameter = descent_of([1.0])
    calls = []

    def broken(differentiate):
        calls.append(1)
        return differentiate(parameter.sum() + (parameter - parameter).abs().sqrt().sum())  # whose slope at 0 is not finite

    with pytest.raises(ForgetError, match="not finite at step 1"):
        descent.take(broken)
    assert len(calls) == HALVINGS + 1
    descent.state.losses.append(1.0)
    for loss in (broken, lambda differentiate: differentiate(parameter.sum() * float("nan"))):
        assert descent.take(loss) is None and parameter.item() == 1


def test_where_the_last_step_led_to_no_numbers_the_good_parameters_come_back():
    descent, parameter = descent_of([1.0], rate=1.0, max_norm=None)
    descent.take(lambda differentiate: differentiate(parameter.sum()))
    assert settled(descent.state, lambda: parameter.item(), True) == (0, True)
    assert settled(descent.state, lambda: 1.0 if parameter.item() else float("inf"), True) == (1, False)
    assert parameter.item() == 1
