"""Trains the embedded model from nothing: `python -m demo.recipe.train --help`."""

import argparse
import math
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..host import CHECKPOINT
from ..vocabulary import PEOPLE, STYLES, with_article
from .autoencoder import Autoencoder, encode_all, normalise, psnr, train_autoencoder, train_decoder
from .checkpoint import save_checkpoint
from .dataset import make_dataset, read_dataset
from .drawings import default_cache
from .text_encoder import Words, hidden_states, make_text_encoder, make_tokenizer, train_text_encoder, with_full_table
from .unet import make_unet, sample, sheet, train_unet

SHEET = ("cat", "rose", "house")  # drawn every SHEET_SECONDS of the training of the UNet
SHEET_SECONDS = 600


class Run:
    """One stage of training: seeded, stopped by steps or minutes, resumed from its checkpoint."""

    def __init__(self, name, folder, minutes, device="cpu", bf16=False, seed=0, most_steps=None):
        self.name, self.path, self.minutes = name, Path(folder) / f"{name}.checkpoint.pt", minutes
        self.device, self.bf16, self.most_steps = torch.device(device), bf16, most_steps
        self.dice = torch.Generator().manual_seed(seed)
        self.spent, self.smooth = 0.0, {}

    def integers(self, below, shape):
        return torch.randint(below, shape, generator=self.dice)

    def normal(self, shape):
        return torch.randn(shape, generator=self.dice).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @staticmethod
    def cosine(done, warm=0.01):
        """A short rise from 0 to 1, then half a cosine down to 0, for `done` in 0..1."""
        return min(1, done / warm) * 0.5 * (1 + math.cos(math.pi * min(1, done)))

    def progress(self, step):
        return max(self.spent / (60 * self.minutes), step / self.most_steps if self.most_steps else 0)

    def steps(self, model, optimizer, rate, show=None):
        """Yields step numbers until the time or the steps are up; `rate(done)` gives the learning rate.

        `show(step)` is called now and then, its time not counted.
        """
        self.model, self.optimizer, step = model, optimizer, 0
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.dice.set_state(state["dice"].cpu())
            step, self.spent = state["step"], state["spent"]
        with tqdm(total=100, desc=self.name, bar_format="{l_bar}{bar}| {postfix}") as bar:
            saved = shown = time.monotonic()
            while self.progress(step) < 1:
                start = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = rate(self.progress(step))
                yield step
                step += 1
                self.spent += time.monotonic() - start
                bar.n = round(100 * min(1, self.progress(step)), 1)
                numbers = " ".join(f"{key} {value:.4f}" for key, value in self.smooth.items())
                bar.set_postfix_str(f"step {step} {numbers} {self.spent:.0f} s", refresh=False)
                bar.refresh() if step % 20 == 0 else None
                if time.monotonic() - saved > 120:
                    self.save(step)
                    saved = time.monotonic()
                if show and time.monotonic() - shown > SHEET_SECONDS:
                    show(step)
                    shown = time.monotonic()
        self.save(step)

    def save(self, step):
        """Writes the checkpoint under another name and renames it, so that a kill leaves the last one whole."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
        torch.save({**state, "spent": self.spent, "dice": self.dice.get_state()}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def backward(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self, step, **numbers):
        """One step of the optimizer on the gradients there are, clipped to norm 1; numbers are shown smoothed."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for key, value in numbers.items():
            self.smooth[key] = 0.99 * self.smooth.get(key, value) + 0.01 * value


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m demo.recipe.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=default_cache() / "embedded-model", help="data and checkpoints")
    parser.add_argument("--cache", type=Path, default=default_cache() / "art", help="the packages of drawings")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="the file to write")
    parser.add_argument("--repeats", type=int, default=28, help="pictures of every (object, style) pair")
    parser.add_argument("--limit", type=int, help="make only so many pictures, to try the recipe")
    parser.add_argument("--autoencoder", type=float, default=15, metavar="MINUTES")
    parser.add_argument("--decoder", type=float, default=5, metavar="MINUTES")
    parser.add_argument("--text", type=float, default=3, metavar="MINUTES")
    parser.add_argument("--unet", type=float, default=90, metavar="MINUTES")
    parser.add_argument("--steps", type=int, help="stop every stage after this many steps, whatever the time")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step of the UNet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: slow where the CPU has no AVX-512")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_run(stage, options):
    """The Run of a stage, for as many minutes as the option of its name says."""
    return Run(
        stage, options.work, getattr(options, stage), options.device, options.bf16, options.seed, most_steps=options.steps
    )


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


def main(arguments=None):
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
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


if __name__ == "__main__":
    main()
