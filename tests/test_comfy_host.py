"""The ComfyUI adapter against ComfyUI's own sampler and memory management."""

from __future__ import annotations

import pytest
import torch

from fmn_core.errors import ForgetError


@pytest.fixture
def host(comfy, loaded):
    from fmn_core.hosts.comfy import ComfyHost

    return ComfyHost(*loaded)


def test_the_model_in_the_graph_is_made_of_inference_tensors(loaded):
    """The premise of the adapter's aliasing: autograd refuses such tensors."""
    assert all(p.is_inference() for p in loaded[0].model.diffusion_model.parameters())


def test_predict_equals_the_hosts_own_denoiser(comfy, loaded, host):
    model, _, _ = loaded
    prompts = host.encode(["a noto emoji of a cat"])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([400])
    with host.training(), torch.no_grad():
        epsilon = host.predict(x_t, t, prompts)
    sigma = model.model.model_sampling.sigmas[t]
    x = x_t * (1 + sigma**2).sqrt()
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        x0 = model.model.apply_model(x, sigma, c_crossattn=prompts.embeddings)
    assert torch.allclose(epsilon, (x - x0) / sigma, atol=1e-4)


def test_own_sampler_makes_the_hosts_pictures(host, loaded, sample):
    """sample_ddim starts at the last timestep where the host's sampler starts at infinite noise: close, not equal."""
    from fmn_core.sampling import sample_ddim

    prompts, empty = host.encode(["a noto emoji of a cat"]), host.encode([""])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with host.training():
        ours = sample_ddim(host, noise, prompts, empty, 20, 3.0)
    from demo.judge import Judge

    assert Judge.load().recognised(host.decode(ours)) == ["cat"]


def test_training_loads_the_model_through_the_host_on_a_clone(comfy, loaded, host):
    model = loaded[0]
    assert host.patcher is not model and host.patcher.is_clone(model)
    options = repr(model.model_options)
    with host.training():
        assert comfy.model_management.loaded_models()[0].is_clone(model)
    assert repr(model.model_options) == options and not model.patches


def test_aliases_share_memory(host):
    from fmn_core.hosts.comfy import ordinary_parameters

    unet = host.base.diffusion_model
    before = [p.data_ptr() for p in unet.parameters()]
    with torch.inference_mode(False), ordinary_parameters(unet):
        assert [p.data_ptr() for p in unet.parameters()] == before
        assert not any(p.is_inference() or p.requires_grad for p in unet.parameters())
    assert all(p.is_inference() for p in unet.parameters())


def test_a_vae_is_asked_for_where_pictures_need_one(loaded):
    from fmn_core.hosts.comfy import ComfyHost

    with pytest.raises(ForgetError, match="connect the checkpoint's VAE"):
        ComfyHost(loaded[0], loaded[1]).encode_images(torch.rand(1, 64, 64, 3))


def test_a_model_without_cross_attention_is_refused(comfy, loaded):
    """A real Flux, built small: joint attention, no attn2."""
    from comfy.ldm.flux.model import Flux

    from fmn_core.hosts.comfy import ComfyHost

    flux = loaded[0].clone()
    flux.model = torch.nn.Module()
    flux.model.model_config = comfy.supported_models.Flux({})
    flux.model.diffusion_model = Flux(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=8, context_in_dim=8, hidden_size=32,
        mlp_ratio=2, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True,
        guidance_embed=False, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast,
    )  # fmt: skip
    with pytest.raises(ForgetError, match="load a checkpoint of SD1.x, SD2.x or SDXL"):
        ComfyHost(flux, loaded[1])
