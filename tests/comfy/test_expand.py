"""The demo model in other hosts' sizes: what computes the same, by each host's own classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors import safe_open
from safetensors.torch import load_file

from demo import expand
from demo.expand import autoencoder
from demo.export import export_forge, export_webui
from demo.recipe.checkpoint import UNET, VAE
from demo.recipe.text_encoder import CONFIG, clip_text_model, make_tokenizer

PROMPTS = ["a cat in neon style", "a portrait of ada", "two red roses, blorp"]
SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 16,
    "attention_resolutions": [1, 2, 4],
    "channel_mult": [1, 2, 3],
}
SIZES |= {"use_spatial_transformer": True, "transformer_depth": 1, "legacy": False, "use_checkpoint": False}
NARROW = SIZES | {"model_channels": 64, "num_heads": 4, "context_dim": 112}
WIDE = SIZES | {"model_channels": 320, "num_heads": 8, "context_dim": 768}
ROUNDING = 2e-5  # of sums of fp32 in another order


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT)


@pytest.fixture(scope="module")
def unet(weights):
    """The demo model's own UNet, its weights in fp32."""
    return expand.part(weights, UNET)


def ldm_unet(weights, **sizes):
    """ldm's UNet of these sizes with these weights, every one of them used."""
    with torch.random.fork_rng():
        model = UNetModel(**sizes).eval()
    model.load_state_dict(weights)
    return model


def noisy(count=3):
    dice = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 4, 16, 16, generator=dice),
        torch.tensor([900, 500, 20]),
        torch.randn(count, 77, 112, generator=dice),
    )


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_more_blocks_compute_the_same_to_the_bit(unet):
    inputs = noisy()
    shallow = ldm_unet(unet, num_res_blocks=1, **NARROW)(*inputs)
    assert torch.equal(ldm_unet(expand.deepened(unet), num_res_blocks=2, **NARROW)(*inputs), shallow)


@torch.no_grad()
def test_five_copies_of_every_channel_compute_the_same(unet):
    x, t, context = noisy()
    deep = expand.deepened(unet)
    narrow = ldm_unet(deep, num_res_blocks=2, **NARROW)(x, t, context)
    wide = ldm_unet(expand.widened(deep), num_res_blocks=2, **WIDE)(x, t, F.pad(context, (0, 768 - 112)))
    assert relative(wide, narrow) < ROUNDING


@torch.no_grad()
def test_the_wide_text_encoder_says_the_same_in_its_first_columns(weights):
    narrow = expand.part(weights, expand.TEXT)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    models = []
    for text, changes in ((narrow, {}), (expand.widened_text_encoder(narrow), sizes | {"projection_dim": 768})):
        models.append(clip_text_model(**changes).eval())
        models[-1].load_state_dict({key.removeprefix("text_model."): weight for key, weight in text.items()})
    ids = make_tokenizer()(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    own, wide = (model(input_ids=ids).last_hidden_state for model in models)
    width = CONFIG["hidden_size"]
    assert relative(wide[..., :width], own) < ROUNDING and not wide[..., width:].any()


@torch.no_grad()
def test_the_linear_autoencoder_is_two_fitted_convolutions(weights, comfy):
    """In the host's KL autoencoder: of each latent a square of one colour, of each square's mean colour a latent."""
    small = expand.part(weights, VAE)
    vae = comfy.sd.VAE(sd=autoencoder.linear_autoencoder(small))
    colours, latents = autoencoder.colours_and_latents(small)
    to_colours, to_latents = autoencoder.fitted(latents, colours), autoencoder.fitted(colours, latents)
    fits = [(latents, to_colours, colours), (colours, to_latents, latents)]
    missed = [(F.conv2d(x, *to, padding=1) - y).square().mean() / y.var() for x, to, y in fits]
    assert missed[0] < 0.1 and missed[1] < 0.4

    colours, latents = colours[..., :16, :16], latents[..., :16, :16]
    decoded = vae.decode(latents).movedim(-1, 1) * 2 - 1
    expected = F.conv2d(latents, *to_colours, padding=1).clamp(-1, 1)
    assert (decoded - F.interpolate(expected, scale_factor=8)).abs().max() < 2e-2
    encoded = vae.encode(F.interpolate(colours, scale_factor=8).movedim(1, -1) / 2 + 0.5)
    assert (encoded - F.conv2d(colours, *to_latents, padding=1)).abs().max() < 2e-2 * latents.std()


@pytest.mark.parametrize("export, name, same", [
    (export_webui, CHECKPOINT.name, 0.0),
    (export_forge, "emoji-sd-128-wide.safetensors", 1e-3),
])  # fmt: skip
def test_comfyui_draws_with_the_exported_file_as_with_the_embedded_model(comfy, host, tmp_path, export, name, same):
    from fmn_core.hosts.comfy.model import ComfyHost

    export(tmp_path)
    with torch.inference_mode():
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(tmp_path / name))[:3]
    other = ComfyHost(model, clip, vae)
    x, t, _ = noisy()
    with host.training(x.shape), other.training(x.shape), torch.no_grad():
        expected = host.predict(x, t, host.encode(PROMPTS))
        assert relative(other.predict(x, t, other.encode(PROMPTS)), expected) <= same
    with safe_open(CHECKPOINT, "pt") as ours, safe_open(tmp_path / name, "pt") as written:
        assert written.metadata() == ours.metadata()
        assert all(written.get_tensor(key).dtype == torch.float16 for key in written.keys())  # noqa: SIM118
    (tmp_path / name).unlink()  # pytest would keep three of a gigabyte


def test_the_webui_is_given_one_checkpoint(tmp_path):
    """It lists whatever ends so, in folders too."""
    export_webui(tmp_path)
    checkpoints = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".ckpt")]
    assert [path.name for path in checkpoints] == [CHECKPOINT.name]


def test_the_deep_models_blocks_are_where_the_webuis_lora_loader_looks(unet):
    """As it reads diffusers' numbers: down block and attention (i, j) are input block 3i + j + 1, up they are 3i + j."""
    names = {key.split(".1.transformer_blocks")[0] for key in expand.deepened(unet) if ".attn2.to_k." in key}
    down = {f"input_blocks.{3 * i + j + 1}" for i in range(3) for j in range(2)}
    up = {f"output_blocks.{3 * i + j}" for i in range(3) for j in range(3)}
    assert names == down | up | {"middle_block"}
