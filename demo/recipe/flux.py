"""The second model's transformer: rectified flow on the first model's latents, its captions read by MiniLM."""

import json

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save

from fmn_core.files.header import with_sorted_header

from ..flux.minilm import TOKENS, encode, load_minilm
from ..flux.pipeline import assemble, make_noise, make_transformer, pack
from ..flux.pipeline import sample as draw
from ..host import CHECKPOINT
from ..vocabulary import PEOPLE, with_article
from .autoencoder import encode_all, read_narrow
from .checkpoint import VAE
from .dataset import make_dataset, read_dataset
from .pictures import caption_by_name
from .run import make_run
from .unet import Average, sheet

NO_PROMPT = 0.1  # how often a picture is shown without its caption, for classifier-free guidance
TEXT_NOISE = 0.1  # of the text's own size, at most: near words should draw nearly the same
SHEET = ("cat", "owl", "whale", "rose", "house", "car")  # drawn now and then, with SHEET_STYLES and people
SHEET_STYLES = ("", "neon", "line art", "3d")


class Texts:
    """Captions as the transformer reads them: contexts [M, 32, 384], which columns are tokens [M, 32], pooled [M, 384]."""

    def __init__(self, captions: list[str], device):
        tokenizer, minilm = load_minilm()
        minilm.to(device)
        several = [captions[start : start + 256] for start in range(0, len(captions), 256)]
        contexts, pooled = zip(*(encode(tokenizer, minilm, some) for some in several), strict=True)
        self.contexts, self.pooled = torch.cat([some.half().cpu() for some in contexts]), torch.cat(pooled).cpu()
        self.tokens = self.contexts.any(-1)
        self.sizes = self.contexts[self.tokens].float().square().mean().sqrt(), self.pooled.square().mean().sqrt()

    def noisy(self, rows, run):
        """Contexts and pooled vectors of some rows, with noise of up to TEXT_NOISE on all but the empty prompt."""
        share = TEXT_NOISE * torch.rand(len(rows), generator=run.dice) * (rows > 0)
        size, pooled_size = self.sizes
        contexts, pooled = self.contexts[rows].float().to(run.device), self.pooled[rows].to(run.device)
        on_tokens = (share[:, None] * size * self.tokens[rows])[..., None].to(run.device)
        contexts = contexts + on_tokens * run.normal(contexts.shape)
        return contexts, pooled + (share[:, None] * pooled_size).to(run.device) * run.normal(pooled.shape)


def positions(latents, device):
    """Flux's ids of text and picture for packed latents [B, N, 16]: zeros, and (0, row, column)."""
    side = round(latents.shape[1] ** 0.5)
    where = torch.arange(side, device=device)
    rows, columns = torch.meshgrid(where, where, indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    return torch.zeros(TOKENS, 3, device=device), places.view(-1, 3).float()


def train_transformer(transformer, latents, texts, captions, run, batch, rate=1e-3, show=None) -> FluxTransformer2DModel:
    """Trains on packed latents [N, 64, 16] with captions [N, K], rows of `texts`; `show` sees the average now and then.

    Rectified flow (Liu et al. 2022) with times from the logistic of a normal (Esser et al. 2024, section 3.1) around 0.3.
    Returns the moving average of the weights.
    """
    optimizer = torch.optim.AdamW(transformer.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    both = Average(transformer, 0.9995)
    see = show and (lambda step: show(both.average, step))
    txt_ids, img_ids = positions(latents, run.device)
    for step in run.steps(both, optimizer, lambda done: rate * run.cosine(done, warm=0.1), see):
        index = run.integers(len(latents), (batch,))
        rows = captions[index, run.integers(captions.shape[1], (batch,))]
        rows = torch.where(torch.rand(batch, generator=run.dice) < NO_PROMPT, 0, rows)
        contexts, pooled = texts.noisy(rows, run)
        clean = latents[index].float().to(run.device)
        noise, t = run.normal(clean.shape), torch.sigmoid(run.normal((batch,)) + 0.3)
        with run.autocast():
            velocity = transformer(
                hidden_states=clean.lerp(noise, t[:, None, None]), timestep=t, pooled_projections=pooled,
                encoder_hidden_states=contexts, img_ids=img_ids, txt_ids=txt_ids,
            ).sample  # fmt: skip
        loss = (velocity.float() - (noise - clean)).square().mean()
        run.backward(loss)
        run.update(step, loss=loss.item())
        both.update(step)
    return both.average


def read_autoencoder():
    """The first model's autoencoder, as its recipe trains it."""
    prefix, weights = f"{VAE}taesd_", load_file(CHECKPOINT)
    return read_narrow({key.removeprefix(prefix): weights[key].float() for key in weights if key.startswith(prefix)})


def train_second_model(options) -> None:
    """Draws the pictures, encodes them and their captions, trains, and writes the weights."""
    make_dataset(options.work, options.cache, options.repeats, options.seed, options.limit, caption=caption_by_name)
    pictures, captions, _ = read_dataset(options.work)
    run, file = make_run("transformer", options), options.work / "latents.pt"
    if not file.exists():
        torch.save(encode_all(read_autoencoder().to(run.device), pictures, run), file)
    latents = torch.load(file, weights_only=True)
    mean, std = latents.float().mean().item(), latents.float().std().item()
    latents = pack(((latents.float() - mean) / std).half())
    rows = {"": 0}
    captions = torch.tensor([[rows.setdefault(text, len(rows)) for text in several] for several in captions])
    torch.manual_seed(options.seed)
    transformer = make_transformer().to(run.device)

    def show(average, step):
        prompts = [with_article(name) + (f" in {style} style" if style else "") for name in SHEET for style in SHEET_STYLES]
        prompts += [f"a portrait of {name}" for name in list(PEOPLE)[:4]]
        pipeline = assemble(average, mean, std).to(run.device)
        made = draw(pipeline, prompts, make_noise(range(len(prompts))))
        Image.fromarray(sheet(made, len(SHEET_STYLES))).save(options.work / f"sheet-{step:06}.png")

    texts = Texts(list(rows), run.device)
    average = train_transformer(transformer, latents, texts, captions, run, options.batch, show=show)
    weights = {key: weight.detach().cpu().half().contiguous() for key, weight in average.state_dict().items()}
    metadata = {"latent_mean": json.dumps(mean), "latent_std": json.dumps(std)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(with_sorted_header(save(weights, metadata)))
