"""Trainings whose last steps lead to no numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fmn_core.erasure import resteering
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert
from fmn_core.training.loop import TrainingRun

PAPER = make_config(preset="paper", steps=4, num_images=2, num_inference_steps=3, resolution=64)


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
