"""Trains a demo model from nothing: `python -m demo.recipe.train [--model flux]`."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from ..flux.checkpoint import WEIGHTS
from ..host import CHECKPOINT
from ..vocabulary import PEOPLE, STYLES, with_article
from .autoencoder import Autoencoder, encode_all, normalise, psnr, train_autoencoder, train_decoder
from .checkpoint import save_checkpoint
from .dataset import make_dataset, read_dataset
from .drawings import default_cache
from .flux import train_second_model
from .run import make_run
from .text_encoder import Words, hidden_states, make_text_encoder, make_tokenizer, train_text_encoder, with_full_table
from .unet import make_unet, sample, sheet, train_unet

SHEET = ("cat", "rose", "house")  # drawn now and then while the UNet is trained


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m demo.recipe.train", description=__doc__)
    parser.add_argument("--model", choices=["sd", "flux"], default="sd", help="the first demo model, or the second")
    parser.add_argument("--work", type=Path, help="data and checkpoints, in a folder of the model's own")
    parser.add_argument("--cache", type=Path, default=default_cache() / "art", help="the packages of drawings")
    parser.add_argument("--output", type=Path, help="the file to write")
    parser.add_argument("--repeats", type=int, default=28, help="pictures of every (object, style) pair")
    parser.add_argument("--limit", type=int, help="make only so many pictures, to try the recipe")
    parser.add_argument("--autoencoder", type=float, default=15, metavar="MINUTES")
    parser.add_argument("--decoder", type=float, default=5, metavar="MINUTES")
    parser.add_argument("--text", type=float, default=3, metavar="MINUTES")
    parser.add_argument("--unet", type=float, default=90, metavar="MINUTES")
    parser.add_argument("--transformer", type=float, default=100, metavar="MINUTES", help="the second model's only stage")
    parser.add_argument("--steps", type=int, help="stop every stage after this many steps, whatever the time")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step of the UNet or the transformer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: slow where the CPU has no AVX-512")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.work = options.work or default_cache() / {"sd": "demo-model", "flux": "flux-model"}[options.model]
    options.output = options.output or {"sd": CHECKPOINT, "flux": WEIGHTS}[options.model]
    return options


def train_autoencoder_stage(options, pictures):
    """The trained autoencoder and the latents of all pictures, from disk where they are there."""
    torch.manual_seed(options.seed)
    model = Autoencoder().to(options.device, memory_format=torch.channels_last)
    encoder, decoder = options.work / "encoder.pt", options.work / "decoder.pt"
    few = pictures[:12000]
    if not encoder.exists():
        run = make_run("autoencoder", options)
        train_autoencoder(model, few, run)
        latents = normalise(model, encode_all(model, pictures, run))
        torch.save({"model": model.state_dict(), "latents": latents}, encoder)
    state = torch.load(encoder, map_location=options.device, weights_only=True)
    model.load_state_dict(state["model"])
    latents = state["latents"].cpu()
    if not decoder.exists():
        train_decoder(model, few, latents, make_run("decoder", options))
        print(f"autoencoder: {psnr(model, pictures[-256:], options.device):.1f} dB")
        torch.save(model.decoder.state_dict(), decoder)
    model.decoder.load_state_dict(torch.load(decoder, map_location=options.device, weights_only=True))
    return model.eval(), latents


def train_text_stage(options, words):
    """The trained text encoder, from disk where it is there."""
    torch.manual_seed(options.seed)
    model, file = make_text_encoder(words).to(options.device), options.work / "text.pt"
    if not file.exists():
        train_text_encoder(model, words, make_run("text", options))
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, map_location=options.device, weights_only=True))
    return model.eval()


@torch.no_grad()
def encode_captions(model, words, texts, device):
    """Contexts [M, 77, D] of distinct texts, bf16."""
    rows = torch.tensor([words.rows(words.ids(text)) for text in texts], device=device)
    return torch.cat([hidden_states(model, part).bfloat16().cpu() for part in rows.split(256)])


def train_first_model(options):
    """All stages of the first model."""
    make_dataset(options.work, options.cache, options.repeats, options.seed, options.limit)
    pictures, captions, _ = read_dataset(options.work)
    autoencoder, latents = train_autoencoder_stage(options, pictures)
    words = Words(make_tokenizer())
    text_encoder = train_text_stage(options, words)
    texts = {"": 0}
    for several in captions:
        for text in several:
            texts.setdefault(text, len(texts))
    contexts = encode_captions(text_encoder, words, texts, options.device)
    rows = torch.tensor([[texts[text] for text in several] for several in captions])
    torch.manual_seed(options.seed)
    unet = make_unet().to(options.device)

    def show(unet, step):
        prompts = [with_article(name) + (f" in {style} style" if style else "") for name in SHEET for style in ("", *STYLES)]
        prompts += [f"a portrait of {name}" for name in list(PEOPLE)[: len(STYLES) + 1]]
        known = encode_captions(text_encoder, words, ["", *prompts], options.device).float().to(options.device)
        made = torch.cat([sample(unet, part, known[0], range(len(part))) for part in known[1:].split(33)])
        picture = sheet(autoencoder.decode(made).detach(), len(STYLES) + 1)
        Image.fromarray(picture).save(options.work / f"sheet-{step:06}.png")

    unet = train_unet(unet, latents, contexts, rows, make_run("unet", options), options.batch, show=show)
    save_checkpoint(options.output, unet, with_full_table(text_encoder.state_dict(), words), autoencoder)


def main(arguments=None):
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.model == "flux":
        train_second_model(options)
    else:
        train_first_model(options)


if __name__ == "__main__":
    main()
