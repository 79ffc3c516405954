"""A user's wish to end the training here keeps what was learned, where a host tells it from breaking off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fmn_core import robust
from fmn_core.forget import forget, summary
from fmn_core.patch import check_patch
from fmn_core.settings import ForgetSettings

QUICK = ForgetSettings(steps=6, num_pictures=1, sampling_steps=2, resolution=64, rounds=2)


@pytest.fixture
def host(loaded):
    from fmn_core.hosts.comfy import ComfyHost

    return ComfyHost(*loaded, resolution=64)


@pytest.mark.parametrize("preset", ["paper", "balanced", "robust"])
def test_stopped_training_gives_the_patch_so_far(host, monkeypatch, preset):
    monkeypatch.setattr(robust, "LEARNED_STEPS", 2)
    monkeypatch.setattr(robust, "NEAR", 1)
    asked = []
    monkeypatch.setattr(host, "stops", lambda: asked.append(1) or len(asked) > 1)  # in the third step
    patch, losses = forget(host, "cat", replace(QUICK, preset=preset, strict=preset == "robust"))
    assert len(losses) == 2 and patch.info["report"]["steps"] == 2
    check_patch(patch, "it")
    assert "Stopped after 2 steps, as asked" in summary(patch) and "diverged" not in summary(patch)


def test_at_least_one_step_is_taken_before_it_stops(host, monkeypatch):
    monkeypatch.setattr(host, "stops", lambda: True)
    _, losses = forget(host, "cat", replace(QUICK, preset="paper"))
    assert len(losses) == 1
