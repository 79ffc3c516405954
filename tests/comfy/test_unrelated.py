"""What is kept is looked at in the end of every preset: noise estimates of unrelated prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from presets import config_for

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.erasure.unrelated import LARGE_DRIFT, unrelated_drift, unrelated_prompts, unrelated_warnings
from fmn_core.errors import ForgetError
from fmn_core.patch.apply import applied
from fmn_core.patch.patch import Patch
from fmn_core.patch.summary import summary
from fmn_core.text.tokens import find_tokens

pytestmark = pytest.mark.usefixtures("little_probed")
SMALL = {"steps": 2, "num_images": 1, "num_inference_steps": 2, "attack_rounds": 1}
FAST = make_config()
PRESETS = ("fast", "paper", "balanced", "robust")


def drift_of(host, *patches):
    prompts = unrelated_prompts(host, ["cat"])
    with host.training((len(prompts), *host.latent_shape())):
        return unrelated_drift(host, prompts, *patches)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_tells_how_far_unrelated_prompts_move(host, preset):
    patch, _ = forget(host, "cat", config_for(preset, **SMALL))
    drift = patch.info["report"]["unrelated_drift"]
    assert drift == pytest.approx(drift_of(host, applied(host, patch)), rel=0.05), "the file's, but for its precision"
    assert drift > 1e-6
    assert drift < LARGE_DRIFT and f"Noise estimates of unrelated prompts change by {drift:.2%}." in summary(patch)
    assert not any("suffer" in warning for warning in patch.info["report"]["warnings"])


@pytest.mark.parametrize("layers", ["cross_attention", "whole_unet"])
def test_a_training_that_destroys_the_model_says_so(host, layers):
    settings = config_for(
        "paper", **SMALL | {"steps": 8}, learning_rate=5e-2, train_layers=layers, target_modules="q,k,v,out"
    )
    patch, _ = forget(host, "cat", settings)
    report = patch.info["report"]
    assert report["unrelated_drift"] > LARGE_DRIFT
    assert any("Unrelated prompts suffer" in warning for warning in report["warnings"])
    with pytest.raises(ForgetError, match="Unrelated prompts suffer"):
        forget(host, "cat", replace(settings, strict=True))


def test_an_edit_in_closed_form_that_harms_everything_says_so(host, monkeypatch):
    from fmn_core.erasure import closed_form as fast

    plain = fast.edit_factors
    monkeypatch.setattr(fast, "edit_factors", lambda *how: {key: (99 * up, down) for key, (up, down) in plain(*how).items()})
    patch, _ = forget(host, "cat", FAST)
    assert any("Unrelated prompts suffer" in warning for warning in patch.info["report"]["warnings"])


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_model_whose_own_estimates_are_no_numbers_costs_no_patch_and_is_told(host, monkeypatch, preset):
    """As those of some models are in half precision, beyond the attention that is trained on."""
    predict = host.predict
    monkeypatch.setattr(host, "predict", lambda *asked: predict(*asked) * float("nan"))
    images = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    patch, _ = forget(host, "cat", config_for(preset, **SMALL, resolution=64), images=None if preset == "fast" else images)
    assert "unrelated_drift" not in patch.info["report"]
    assert any("own noise estimates are not finite" in warning for warning in patch.info["report"]["warnings"])
    assert "own noise estimates are not finite" in summary(patch) and "unrelated prompts change" not in summary(patch)
    json.dumps(patch.info, allow_nan=False)


def test_the_edit_is_made_where_the_unet_cannot_be_asked(host, monkeypatch):
    wanted, _ = forget(host, "cat", FAST)

    def short_of_memory(*asked):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def refused(*asked):
        raise ForgetError("Only the preset `fast` works on it.")

    def elsewhere(*asked):
        raise RuntimeError("Expected all tensors to be on the same device")

    for predict in (short_of_memory, refused, elsewhere):
        monkeypatch.setattr(host, "predict", predict)
        patch, _ = forget(host, "cat", FAST)
        assert "unrelated_drift" not in patch.info["report"] and "unrelated" not in summary(patch)
        assert all(torch.equal(patch[key], wanted[key]) for key in wanted)


def test_a_patch_that_gives_no_numbers_is_refused(host, monkeypatch):
    from fmn_core.erasure import unrelated

    monkeypatch.setattr(unrelated, "noise_drift", lambda after, before: torch.full((4,), torch.nan))
    with pytest.raises(ForgetError, match="no finite noise estimates"):
        forget(host, "cat", FAST)


def test_it_is_nothing_without_a_patch_and_the_same_each_time(host):
    patch, _ = forget(host, "cat", config_for("paper", **SMALL))
    assert drift_of(host) == 0
    assert drift_of(host, applied(host, patch)) == drift_of(host, applied(host, patch)) > 0
    emptied = Patch({key: value * (not key.endswith("up.weight")) for key, value in patch.items()}, patch.info)
    assert drift_of(host, applied(host, emptied)) == 0


def test_no_prompt_names_the_concept(host):
    for name in ("car", "mountains", "a", "portrait"):
        prompts = unrelated_prompts(host, [name])
        found = [bool(find_tokens(host.tokenize(text), host.tokenize(name))) for text in prompts.texts]
        assert len(found) in (3, 4) and (name == "a" or not any(found))


def test_what_is_little_gets_no_warning():
    assert not unrelated_warnings(LARGE_DRIFT) and "change by 3%" in unrelated_warnings(0.03)[0]
