"""Writes the embedded model for other hosts: `python -m demo.export diffusers FOLDER`, `python -m demo.export webui FOLDER`.

diffusers: a pipeline's folder, for StableDiffusionPipeline.from_pretrained.
webui: FOLDER is the models/Stable-diffusion of an AUTOMATIC1111 webui with this pack among its extensions; the
checkpoint goes there with the .yaml that says its widths, and beside them a folder with its text encoder's sizes.
"""

import argparse
import shutil
from pathlib import Path

import torch

from fmn_core.hosts.webui.taesd import LATENT_CHANNELS, WIDTH

from .host import CHECKPOINT, comfyui_folder
from .recipe.autoencoder import SCALE
from .recipe.checkpoint import read_checkpoint
from .recipe.text_encoder import CONFIG as TEXT
from .recipe.text_encoder import CLIPTextConfig, CLIPTextModel, make_tokenizer
from .recipe.unet import BETAS, HEADS, WIDTHS, make_schedule, make_unet

WEBUI_CONFIG = """\
# SD1's v1-inference.yaml in the embedded model's widths.
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: {start}
    linear_end: {end}
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: {latent_channels}
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/simple_loss_ema
    scale_factor: {scale}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 16
        in_channels: {latent_channels}
        out_channels: {latent_channels}
        model_channels: {channels}
        attention_resolutions: {resolutions}
        num_res_blocks: 1
        channel_mult: {multipliers}
        num_heads: {heads}
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: {autoencoder}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {text_encoder}
"""


def make_text_encoder(weights: dict) -> CLIPTextModel:
    """The text encoder of a checkpoint as transformers' model."""
    model = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    getattr(model, "text_model", model).load_state_dict(weights)
    return model


def make_pipeline(checkpoint: Path = CHECKPOINT):
    """The checkpoint as diffusers' StableDiffusionPipeline, fp32."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    unet_weights, text_weights, vae_weights = read_checkpoint(checkpoint)
    unet = make_unet()
    unet.load_state_dict(unet_weights)
    vae = AutoencoderTiny(encoder_block_out_channels=(WIDTH,) * 4, decoder_block_out_channels=(WIDTH,) * 4)
    vae.load_state_dict(vae_weights)
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=make_text_encoder(text_weights), tokenizer=make_tokenizer(), unet=unet.eval(),
        scheduler=make_schedule(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export_diffusers(folder: Path, checkpoint: Path = CHECKPOINT) -> None:
    """Writes a pipeline's folder."""
    make_pipeline(checkpoint).save_pretrained(folder)


def export_webui(folder: Path, checkpoint: Path = CHECKPOINT, autoencoder: str | None = None) -> None:
    """Writes the checkpoint, its .yaml, and the folder of its text encoder; `autoencoder` is a class's import path.

    The webui has no TAESD that it could train or encode with, so the .yaml names the pack's own, by the path that it
    has from the webui's folder.
    """
    pack = Path(__file__).resolve().parents[1]
    autoencoder = autoencoder or f"extensions.{pack.name}.fmn_core.hosts.webui.taesd.TAESD"
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / checkpoint.stem
    make_tokenizer().save_pretrained(text)
    for name in ("vocab.json", "merges.txt"):  # transformers 4, which the webui has, reads the vocabulary from these
        shutil.copyfile(comfyui_folder() / "comfy/sd1_tokenizer" / name, text / name)
    make_text_encoder(read_checkpoint(checkpoint)[1]).save_pretrained(text)
    shutil.copyfile(checkpoint, folder / checkpoint.name)
    config = WEBUI_CONFIG.format(
        start=BETAS[0], end=BETAS[1], scale=SCALE, latent_channels=LATENT_CHANNELS, channels=WIDTHS[0],
        resolutions=[2**level for level in range(len(WIDTHS))], multipliers=[width // WIDTHS[0] for width in WIDTHS],
        heads=HEADS, context=TEXT["hidden_size"], autoencoder=autoencoder, text_encoder=text.resolve(),
    )  # fmt: skip
    (folder / f"{checkpoint.stem}.yaml").write_text(config)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m demo.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("host", choices=("diffusers", "webui"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    with torch.no_grad():
        {"diffusers": export_diffusers, "webui": export_webui}[options.host](options.folder, options.checkpoint)
    print(options.folder)


if __name__ == "__main__":
    main()
