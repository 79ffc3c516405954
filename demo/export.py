"""Writes a demo model for other hosts: `python -m demo.export HOST FOLDER [--model flux]`.

diffusers: a pipeline's folder, for StableDiffusionPipeline.from_pretrained. Of the second model, for
demo.flux.pipeline.MiniLMFluxPipeline.from_pretrained, or FluxTransformer2DModel.from_pretrained of its `transformer`.
comfyui: the second model alone: one checkpoint for the stock Load Checkpoint of a ComfyUI that has this pack.
webui: FOLDER is the models/Stable-diffusion of an AUTOMATIC1111 webui with this pack among its extensions. The
checkpoint, with SD1's number of blocks, goes there with the .yaml that says its widths, and beside them a folder with
its text encoder's sizes.
forge: FOLDER is the models/Stable-diffusion of Forge, reForge or Forge neo, or any other for checkpoints of SD1.5: one
in its sizes, 1.2 GB, that needs nothing beside it. Its pictures are blurred (see demo/expand).
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn_core.hosts.webui.taesd import LATENT_CHANNELS, WIDTH

from . import expand
from .flux.checkpoint import FILE as FLUX_FILE
from .flux.checkpoint import write_checkpoint as write_flux_checkpoint
from .host import CHECKPOINT, comfyui_folder
from .recipe.autoencoder import SCALE
from .recipe.checkpoint import read_checkpoint
from .recipe.text_encoder import CONFIG as TEXT
from .recipe.text_encoder import CLIPTextConfig, CLIPTextModel, make_tokenizer
from .recipe.unet import BETAS, HEADS, WIDTHS, make_schedule, make_unet

WEBUI_CONFIG = """\
# SD1's v1-inference.yaml in the demo model's widths.
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
        num_res_blocks: 2
        channel_mult: {multipliers}
        num_heads: {heads}
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: {autoencoder}
      params:
        ddconfig: {{}}
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
    """Writes the checkpoint in SD1's depth, its .yaml, and the folder of its text encoder's sizes and tokenizer.

    The webui has no TAESD that it could train or encode with, so the .yaml names the pack's own: `autoencoder`, a class's
    import path, or else the path that it has from the webui's folder.
    """
    pack = Path(__file__).resolve().parents[1]
    autoencoder = autoencoder or f"extensions.{pack.name}.fmn_core.hosts.webui.taesd.TAESD"
    text = folder / checkpoint.stem
    make_tokenizer().save_pretrained(text)
    for name in ("vocab.json", "merges.txt"):  # transformers 4, which the webui has, reads the vocabulary from these
        shutil.copyfile(comfyui_folder() / "comfy/sd1_tokenizer" / name, text / name)
    CLIPTextConfig(**TEXT).save_pretrained(text)  # weights here the webui would list as a checkpoint
    write_expanded(folder / checkpoint.name, checkpoint, expand.deep)
    config = WEBUI_CONFIG.format(
        start=BETAS[0], end=BETAS[1], scale=SCALE, latent_channels=LATENT_CHANNELS, channels=WIDTHS[0],
        resolutions=[2**level for level in range(len(WIDTHS))], multipliers=[width // WIDTHS[0] for width in WIDTHS],
        heads=HEADS, context=TEXT["hidden_size"], autoencoder=quoted(autoencoder), text_encoder=quoted(str(text.resolve())),
    )  # fmt: skip
    (folder / f"{checkpoint.stem}.yaml").write_text(config, encoding="utf-8")


def quoted(text: str) -> str:
    """A text in YAML, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)  # YAML takes no pairs of escapes for one letter


def export_forge(folder: Path, checkpoint: Path = CHECKPOINT) -> None:
    """Writes the checkpoint in the sizes of SD1.5."""
    write_expanded(folder / f"{checkpoint.stem}-wide.safetensors", checkpoint, expand.wide)


def write_expanded(file: Path, checkpoint: Path, expanded: Callable[[dict], dict]) -> None:
    """Writes what `expanded` makes of a checkpoint, with its metadata."""
    with safe_open(checkpoint, "pt") as known:
        metadata = known.metadata()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(expanded(load_file(checkpoint)), file, metadata)


def export_flux_diffusers(folder: Path) -> None:
    """Writes the second model as a pipeline's folder."""
    from .flux.pipeline import make_pipeline as make_flux_pipeline

    make_flux_pipeline().save_pretrained(folder)


EXPORTS = {
    "sd": {"diffusers": export_diffusers, "webui": export_webui, "forge": export_forge},
    "flux": {
        "diffusers": export_flux_diffusers,
        "comfyui": lambda folder: write_flux_checkpoint(folder / FLUX_FILE.name),
    },
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m demo.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("host", choices=["diffusers", "comfyui", "webui", "forge"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=EXPORTS, default="sd", help="the first demo model, or the second")
    parser.add_argument("--checkpoint", type=Path, help="another file of the first one's kind")
    options = parser.parse_args()
    if options.host not in EXPORTS[options.model]:
        parser.error(f"--model {options.model} is written for {', '.join(EXPORTS[options.model])}.")
    if options.checkpoint and options.model != "sd":
        parser.error("--checkpoint is for the first model.")
    with torch.no_grad():
        EXPORTS[options.model][options.host](options.folder, *([options.checkpoint] if options.checkpoint else []))
    print(options.folder)


if __name__ == "__main__":
    main()
