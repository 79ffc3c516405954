"""A training step: what half precision would lose, what overflows, and what a step that cannot be taken leaves."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.erasure import resteering
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert
from fmn_core.lora.layers import CrossAttentionLoRA
from fmn_core.training.checkpoint import State
from fmn_core.training.loop import HALVINGS, STEADY, Descent, TrainingRun, settled
from fmn_core.training.losses import visual_denoising_loss
from fmn_core.training.memory import AdaptiveCheckpointing

PAPER = make_config(preset="paper", steps=4, num_images=2, num_inference_steps=3, resolution=64)
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


def slope(pipeline, t, scale):
    """The gradient of the visual denoising loss by a LoRA, as a step of this scale takes it."""
    host, generator = DiffusersHost(pipeline, progress_bar=False), torch.Generator().manual_seed(0)
    prompts, t = host.encode(["a photo of a cat"]), torch.tensor([t])
    x0, noise, change = torch.randn(3, 1, *host.latent_shape(), generator=generator)
    a, without = host.alphas_cumprod[t], x0 + 0.1 * change
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with host.training(x_t.shape):
        lora = CrossAttentionLoRA(host.cross_attentions(), ("to_k", "to_v"), 2, generator)
        for adapter in lora.values():
            torch.nn.init.normal_(adapter.up, std=0.01, generator=generator)
        parameters = [*lora.parameters()]
        state = State(parameters, torch.optim.SGD(parameters, lr=0.0), generator, most_scale=scale)

        def step(differentiate):
            with lora.attached():
                epsilon = host.predict(x_t, t, prompts)
                return differentiate(visual_denoising_loss(x_t, epsilon, a, without))

        Descent(AdaptiveCheckpointing(host), state, max_norm=None).take(step)
    return torch.cat([p.grad.flatten() for p in parameters])


def test_the_visual_losss_gradient_survives_half_precision(pipeline):
    """On the real UNet, in half as on a GPU: at a scale of 1 a part of it is lost."""
    half = copy.deepcopy(pipeline)
    half.unet.half()
    true = slope(pipeline, 20, 1.0)
    lost = {scale: ((slope(half, 20, scale) - true).norm() / true.norm()).item() for scale in (1.0, 2.0**16)}
    assert lost[2.0**16] < 0.01 and lost[1.0] > 0.03, lost


def broken_from(call, monkeypatch):
    """Gradients of the re-steering loss that are not finite from a call on; the losses are."""
    formula, calls = resteering.attention_resteering_loss, []

    def breaking(*arguments):
        loss = formula(*arguments)
        calls.append(1)
        if len(calls) >= call:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(resteering, "attention_resteering_loss", breaking)


@pytest.mark.parametrize("layers", ["cross_attention", "whole_unet"])
def test_a_last_gradient_that_is_not_finite_costs_its_own_step_alone(host, monkeypatch, layers):
    three, losses = forget(host, "cat", replace(PAPER, steps=3, train_layers=layers))
    broken_from(4, monkeypatch)
    patch, stopped = forget(host, "cat", replace(PAPER, train_layers=layers))
    assert stopped == losses and patch.keys() == three.keys() and patch.unet_lora.keys() == three.unet_lora.keys()
    assert all(torch.equal(patch[key], three[key]) for key in three)
    assert all(torch.equal(patch.unet_lora[key], three.unet_lora[key]) for key in three.unet_lora)
    assert "diverged after step 3 of 4, and the last good state was kept" in patch.info["report"]["warnings"][0]


def test_a_last_step_into_no_numbers_is_taken_back(host, monkeypatch):
    """Where nothing has looked at its outcome yet but the measurement in the end."""
    two, _ = forget(host, "cat", replace(PAPER, steps=2))
    step, taken = torch.optim.AdamW.step, []

    def leaping(self, closure=None):
        step(self, closure)
        taken.append(1)
        if len(taken) == 3:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(1e25)

    monkeypatch.setattr(torch.optim.AdamW, "step", leaping)
    patch, losses = forget(host, "cat", replace(PAPER, steps=3))
    assert all(torch.equal(patch[key], two[key]) for key in two) and len(losses) == 3
    assert "diverged after step 3 of 3" in patch.info["report"]["warnings"][0]
    taken.clear()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = invert(TrainingRun(host, InversionConfig(steps=3)), latents)
    assert learned.vectors["clip_l"].isfinite().all() and "diverged after step 3 of 3" in learned.warnings[0]
