"""Pipelines of diffusers that are not plain text to image: each works, or is refused with its cause."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from presets import config_for

from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.hosts.diffusers.attention import record_attention
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.patch.file import serialize
from fmn_core.training.losses import predicted_x0
from fmn_core.training.sampling import sample_ddim

QUICK = {"steps": 2, "num_images": 1, "num_inference_steps": 2, "resolution": 64}
TRAINED = ["paper", "balanced"]
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def small_unet(channels=4, **config):
    """A UNet with random weights that reads the demo model's text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    return UNet2DConditionModel(
        **{"sample_size": 8, "in_channels": channels, "cross_attention_dim": 112, **BLOCKS, **sizes, **config}
    ).eval()


@pytest.fixture
def variant(pipeline):
    """variant(kind, part=..., ...): the demo model's pipeline, or one of another kind, with other parts in it."""

    def variant(kind=None, **parts):
        known = {name: part for name, part in pipeline.components.items() if name != "image_encoder"} | parts
        return (kind or type(pipeline))(**known, requires_safety_checker=False)

    return variant


def trained(pipeline, preset="paper", **settings):
    """The patch's bytes."""
    host = DiffusersHost(pipeline, progress_bar=False)
    return serialize(forget(host, "cat", config_for(preset, **QUICK, **settings))[0], "p")


def seen_by(unet, work):
    """The latents that the UNet is called with while `work` runs."""
    seen = []
    hook = unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["sample"]), with_kwargs=True
    )
    work()
    hook.remove()
    return seen


@pytest.mark.parametrize("preset", ["fast", *TRAINED])
@pytest.mark.parametrize(("kind", "channels"), [("Inpaint", 9), ("InstructPix2Pix", 8)])
def test_models_that_inpaint_or_edit_forget(variant, kind, channels, preset):
    import diffusers

    kind = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    assert trained(variant(kind, unet=small_unet(channels)), preset)


def test_what_goes_beside_the_latent_is_what_diffusers_puts_there(variant):
    import diffusers

    black, white = (Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (0, 255))
    how = {"image": black, "num_inference_steps": 1, "output_type": "latent"}
    painting = variant(diffusers.StableDiffusionInpaintPipeline, unet=small_unet(9))
    editing = variant(diffusers.StableDiffusionInstructPix2PixPipeline, unet=small_unet(8))
    for pipeline, more in ((painting, {"mask_image": white, "height": 64, "width": 64}), (editing, {})):
        theirs = seen_by(pipeline.unet, lambda: pipeline("a cat", **how, **more))[0]  # noqa: B023
        host = DiffusersHost(pipeline, progress_bar=False)
        ours = host.with_beside(theirs[-1:, :4])  # the last row of editing is the one without a picture
        assert torch.allclose(ours, theirs[-1:], atol=1e-5)


@pytest.mark.parametrize("preset", TRAINED)
def test_a_schedule_that_ends_in_noise_alone_trains(variant, pipeline, preset):
    from diffusers import DDIMScheduler

    schedule = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    assert schedule.alphas_cumprod[-1] == 0
    changed = variant(scheduler=schedule)
    assert trained(changed, preset)
    host = DiffusersHost(changed, progress_bar=False)
    noise, prompt = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), host.encode(["a cat"])
    last = torch.tensor([len(host.alphas_cumprod) - 1])
    with host.training(noise.shape), torch.no_grad():
        x0 = predicted_x0(noise, host.predict(noise, last, prompt), host.alphas_cumprod[last])
        velocity = host.unet(noise, last, prompt.prompt_embeds).sample
        assert torch.allclose(x0, -velocity, atol=0.01)  # v = sqrt(a) epsilon - sqrt(1 - a) x0
        assert sample_ddim(host, noise, prompt, host.encode([""]), steps=4, guidance=3.0).isfinite().all()


def test_a_pipeline_without_vae_trains_and_says_what_pictures_need(variant):
    without = variant(vae=None)
    assert trained(without)
    host = DiffusersHost(without, progress_bar=False)
    assert host.decode(torch.zeros(1, 4, 8, 8)) is None
    with pytest.raises(ForgetError, match="without its vae"):
        forget(host, "cat", config_for("paper", **QUICK), images=torch.rand(1, 64, 64, 3))


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_pipeline_gives_what_the_plain_one_gives(variant, way):
    plain, unet = variant(unet=small_unet()), small_unet()
    if way == "in place":
        unet.compile(backend="eager")
    compiled = variant()
    compiled.unet = torch.compile(unet, backend="eager") if way == "wrapped" else unet
    how = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    compiled("a cat", **how)  # before any hook is there
    assert trained(compiled) == trained(plain)
    maps = []
    for one in (plain, compiled):
        with record_attention(DiffusersHost(one, progress_bar=False), "a cat") as recording:
            one("a cat", **how, generator=torch.Generator().manual_seed(0))
        maps.append(recording.map(recording.layers[0]))
    assert maps[0].any() and torch.equal(*maps)


def fused(pipeline):
    pipeline.fuse_qkv_projections(vae=False)


def flow(pipeline):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()


def flux(pipeline):
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    del pipeline.unet
    pipeline.register_modules(transformer=transformer)
    flow(pipeline)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (fused, "fused projections.*unfuse_qkv_projections"),
        (flow, "FlowMatchEulerDiscreteScheduler.*alphas_cumprod"),
        (flux, "no UNet with text cross-attention"),
        (lambda p: p.register_modules(text_encoder=None), "without its text_encoder"),
        (lambda p: p.scheduler.register_to_config(prediction_type="sample"), "predicts epsilon or v_prediction"),
    ],
)
def test_what_cannot_work_is_refused_at_loading_with_its_cause(variant, pipeline, change, why):
    changed = variant(unet=small_unet(), scheduler=copy.deepcopy(pipeline.scheduler))
    change(changed)
    with pytest.raises(ForgetError, match=why):
        DiffusersHost(changed, progress_bar=False)


@pytest.mark.parametrize(
    ("unet", "later", "why"),
    [
        ({"channels": 7}, {}, "takes 3 channels beside"),
        ({"num_class_embeds": 3}, {}, "a class or a noise level"),
        ({"addition_embed_type": "text"}, {}, "of the kind text"),
        ({}, {"encoder_hid_dim_type": "ip_image_proj"}, "unload_ip_adapter"),  # as load_ip_adapter says it
    ],
)
def test_what_text_alone_cannot_steer_has_the_preset_fast(variant, unet, later, why):
    changed = variant(unet=small_unet(**unet))
    changed.unet.register_to_config(**later)
    assert trained(changed, "fast")
    with pytest.raises(ForgetError, match=f"{why}.*only the preset `fast`"):
        trained(changed, "paper")
