"""What is Forge's alone: run by tests/webui/test_webui_hosts.py."""

from __future__ import annotations

import pytest
import torch
from modules import sd_models

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.hosts.webui.model import current_host


def test_the_chosen_model_is_loaded_when_asked_for(webui, monkeypatch):
    data = sd_models.model_data
    monkeypatch.setattr(data, "sd_model", sd_models.FakeInitialModel())
    monkeypatch.setattr(data, "forge_hash", "")
    host = current_host()
    assert host.sd_model is data.sd_model and type(data.sd_model).__name__ == "StableDiffusion"
    assert host.sd_model is not webui.sd_model and list(host.cross_attentions()) == list(webui.cross_attentions())


def test_before_anything_is_chosen_it_is_said(monkeypatch):
    monkeypatch.setattr(sd_models.model_data, "forge_loading_parameters", {})
    with pytest.raises(ForgetError, match="No model is loaded"):
        current_host()


@pytest.mark.parametrize("storage", ["nf4", torch.uint8])
def test_quantised_weights_are_refused(webui, monkeypatch, storage):
    monkeypatch.setattr(webui.base, "storage_dtype", storage)
    with pytest.raises(ForgetError, match="quantised.*Low Bits"):
        current_host()


FP8 = torch.float8_e4m3fn
TRAINED = make_config(preset="paper", steps=2, batch_size=1, num_images=1, num_inference_steps=2, resolution=64)


def in_fp8(webui, monkeypatch, scaled):
    """Puts the weights of the UNet's Linears into fp8, as `Diffusion in Low Bits` or a checkpoint in scaled fp8 does."""
    monkeypatch.setattr(webui.base, "storage_dtype", FP8)
    for layer in webui.unet.modules():
        if type(layer).__name__ == "Linear":
            scale = layer.weight.abs().amax() / 448 if scaled else torch.ones(())
            with torch.inference_mode():
                weight = torch.nn.Parameter((layer.weight / scale).to(FP8), requires_grad=False)
            monkeypatch.setitem(layer._parameters, "weight", weight)
            monkeypatch.setattr(layer, "scale_weight", scale if scaled else None)


@pytest.mark.parametrize("settings", [make_config(preset="fast"), TRAINED], ids=["closed form", "trained"])
def test_weights_in_fp8_make_nearly_the_same_patch(webui, job, monkeypatch, settings):
    def change():
        patch = forget(current_host(), "cat", settings)[0]
        pairs = [(patch[f"{m}.lora_up.weight"].float(), patch[f"{m}.lora_down.weight"].float()) for m in patch.modules]
        return torch.cat([(up @ down).flatten() for up, down in pairs])

    whole = change()
    in_fp8(webui, monkeypatch, scaled=False)
    assert torch.nn.functional.cosine_similarity(change(), whole, 0) > 0.9


def test_scaled_fp8_is_refused_before_anything_is_computed(webui, monkeypatch):
    in_fp8(webui, monkeypatch, scaled=True)
    monkeypatch.setattr(type(webui.unet), "forward", None)
    with pytest.raises(ForgetError, match="scaled fp8.*cannot be trained.*load it in fp16"):
        current_host()


def test_weights_are_inference_tensors_and_linears_no_linears(webui):
    """What the other checks rest on."""
    assert all(parameter.is_inference() for parameter in webui.unet.parameters())
    assert not isinstance(webui.unet.get_submodule("middle_block.1.transformer_blocks.0.attn1.to_q"), torch.nn.Linear)
    assert any(name.endswith("attn1_to_q") for name in webui.other_layers())


def test_objects_that_a_picture_made_are_put_back(webui, sd_model):
    objects = sd_model.forge_objects
    webui.encode(["a cat"])
    with pytest.raises(ZeroDivisionError), webui.training((1, *webui.latent_shape())):
        raise ZeroDivisionError
    assert sd_model.forge_objects is objects
