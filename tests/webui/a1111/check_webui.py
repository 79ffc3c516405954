"""What is the webui's alone: run by tests/webui/test_webui_hosts.py."""

from __future__ import annotations

import copy

import pytest
import torch
from modules import devices, sd_hijack, shared

from fmn_core.errors import ForgetError
from fmn_core.hosts.ldm import ordinary_parameters
from fmn_core.hosts.webui.model import adapt, current_host, no_networks


def gradient(webui):
    """Of a change to the to_k of the last level's first layer, by the noise estimate."""
    layer = webui.cross_attentions()["output_blocks.6.1.transformer_blocks.0.attn2"].linear("to_k")
    delta = torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=True)
    hook = layer.register_forward_hook(lambda m, args, out: out + (args[0].float() @ delta.T).to(out.dtype))
    x = torch.ones(1, *webui.latent_shape())
    try:
        webui.predict(x, torch.tensor([500]), webui.encode(["a cat"])).square().sum().backward()
    finally:
        hook.remove()
    return delta.grad


def test_attention_is_changed_on_this_models_layers_alone(webui):
    """The class keeps the webui's own attention, and with it every other model."""
    attention = next(iter(webui.cross_attentions().values())).module
    other = type(attention)(16, 16, heads=2, dim_head=8)
    with webui.training((1, *webui.latent_shape())):
        assert type(attention).forward is sd_hijack.optimized_forward
        with pytest.raises(NotImplementedError):
            other(torch.ones(1, 4, 16, requires_grad=True)).sum().backward()
        assert gradient(webui).abs().sum() > 0
    with pytest.raises(NotImplementedError):
        x, context = (torch.ones(1, 4, linear.in_features) for linear in (attention.to_q, attention.to_k))
        attention(x, context).sum().backward()


def test_an_attention_that_another_extension_put_on_a_layer_stays(webui, monkeypatch):
    attention = next(iter(webui.cross_attentions().values())).module
    theirs = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(attention, "forward", theirs, raising=False)
    with webui.training((1, *webui.latent_shape())):
        assert attention.forward is not theirs
    assert attention.forward is theirs


def test_gradient_checkpointing_of_the_ldm_hides_no_gradient(webui, monkeypatch):
    """As extensions for training switch it on: its backward knows the layer's own weights and no adapter's."""
    with webui.training((1, *webui.latent_shape())):
        plain = gradient(webui)
    blocks = [m for m in webui.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        monkeypatch.setattr(block, "checkpoint", True)
    with webui.training((1, *webui.latent_shape())):
        assert torch.equal(gradient(webui), plain)
    assert blocks and all(block.checkpoint for block in blocks)


def test_weights_that_a_fork_made_in_inference_mode_train_too(webui):
    with webui.training((1, *webui.latent_shape())):
        plain = gradient(webui)
    with ordinary_parameters(webui.unet):  # puts the webui's own tensors back in the end
        with torch.inference_mode():
            for part in webui.unet.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    part._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
        with webui.training((1, *webui.latent_shape())):
            assert torch.equal(gradient(webui), plain)
        assert next(webui.unet.parameters()).is_inference()


def test_a_lora_on_open_clips_attention_is_taken_out_too(webui):
    """As SD2's text encoder has it: two weights in one layer, whose output's bias is another layer's."""
    layer = torch.nn.MultiheadAttention(8, 2)
    own = [layer.in_proj_weight, layer.out_proj.weight, layer.out_proj.bias]
    layer.network_weights_backup = tuple(torch.full_like(tensor, i) for i, tensor in enumerate(own[:2]))
    layer.network_bias_backup, layer.network_current_names = torch.full_like(own[2], 2), (("style", 1.0, 1.0, None),)
    merged = [tensor.detach().clone() for tensor in own]
    with no_networks([torch.nn.Sequential(layer)]):
        assert [tensor.unique().tolist() for tensor in own] == [[0], [1], [2]] and layer.network_current_names == ()
    assert all(torch.equal(*two) for two in zip(own, merged, strict=True))
    assert layer.network_current_names == (("style", 1.0, 1.0, None),)


def test_pieces_of_a_model_are_refused(monkeypatch):
    monkeypatch.setattr(shared.cmd_opts, "lowvram", True)
    with pytest.raises(ForgetError, match="--lowvram.*--medvram"):
        current_host()


def test_weights_in_half_precision_stay_so_and_adapters_learn_in_full(webui, sd_model, monkeypatch):
    """As a GPU has them, with the webui's autocast around each estimate; it takes the norms' weights in full itself."""
    whole = adapt(sd_model)
    with whole.training((1, *whole.latent_shape())):
        expected = gradient(whole)
    half = copy.deepcopy(sd_model)
    half.model.half()
    for module in half.model.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.float()
    monkeypatch.setattr(devices, "dtype_unet", torch.float16)
    monkeypatch.setattr(devices, "autocast", lambda disable=False: torch.autocast("cpu", dtype=torch.float16))
    host = adapt(half)
    before = [(parameter.dtype, parameter.requires_grad) for parameter in host.unet.parameters()]
    with host.training((1, *host.latent_shape())):
        found = gradient(host)
    assert [(parameter.dtype, parameter.requires_grad) for parameter in host.unet.parameters()] == before
    assert found.dtype == torch.float32 and host.encode(["a cat"]).prompt_embeds.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99
    assert not torch.equal(found, expected), "nothing was computed in half precision"


def test_the_size_is_the_models_own(sd_model):
    assert current_host().latent_shape() == (4, sd_model.image_size, sd_model.image_size)


def test_velocity_becomes_noise(webui, monkeypatch):
    x, t, prompts = torch.randn(1, *webui.latent_shape()), torch.tensor([600]), webui.encode(["a cat"])
    a = webui.alphas_cumprod[t][:, None, None, None]
    with torch.no_grad():
        velocity = webui.predict(x, t, prompts)
        monkeypatch.setattr(webui.sd_model, "parameterization", "v")
        assert torch.allclose(webui.predict(x, t, prompts), a.sqrt() * velocity + (1 - a).sqrt() * x)


def test_an_inpainting_model_is_told_to_draw_everything(webui, sd_model, monkeypatch):
    seen = {}
    monkeypatch.setattr(webui.unet, "in_channels", 9)
    monkeypatch.setattr(type(sd_model), "apply_model", lambda self, x, t, cond: seen.update(cond) or x)
    host = current_host()
    host.predict(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), host.encode(["a", "b"]))
    mask, kept = seen["c_concat"][0].split([1, 4], 1)
    assert mask.shape == (2, 1, 8, 8) and (mask == 1).all()
    assert torch.equal(kept[:1], host.encode_images(torch.full((1, 64, 64, 3), 0.5)))
