"""What is Forge's alone: run by tests/test_webui_hosts.py."""

from __future__ import annotations

import pytest
import torch
from modules import sd_models

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
