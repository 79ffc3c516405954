"""What a patch is worth on other models than the one it was made on: `python -m benchmarks.bases [--quick]`.

Patches that `fast` and `balanced` make on the demo model, at work on that model beside a LoRA of a user's, on one that
was trained further, and half-way between the two; beside them patches that `fast` makes on those models. Then what is
drawn where the concept comes as a picture: from one that shows it (img2img), and by an IP-Adapter.
"""

import argparse
import statistics
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from benchmarks.baselines import applied, changes_by, linears, lora_changes, step_of
from benchmarks.methods import by_preset
from benchmarks.prompts import HEAD
from benchmarks.quality import draw as draw_pictures
from benchmarks.quality import model, pictures_of, score, see
from demo.evaluate import BATCH, GUIDANCE, STEPS, sample
from demo.vocabulary import OBJECTS, with_article
from fmn_core.lora.layers import LoRAs
from fmn_core.text.concept import PROMPT_TEMPLATES
from fmn_core.training.losses import predicted_x0
from fmn_core.training.noise import add_noise, draw, noised
from fmn_core.training.sampling import sample_ddim

JOBS = (("object", ("cat",)), ("object", ("rose",)), ("style", ("neon",)), ("identity", ("ada",)))
SHOWN = [job for job in JOBS if job[0] != "style"]  # what a picture can show
PRESETS = ("fast", "balanced")
LORA_STEPS, LORA_RATE, LORA_RANK = 200, 1e-3, 8
TUNING_STEPS, TUNING_RATE = 200, 3e-5
ADAPTER_STEPS, ADAPTER_RATE, IMAGE_TOKENS = 600, 1e-3, 4
TRAINED_AT_ONCE = 4
STRENGTHS = (0.5, 0.75)  # of img2img: the part of the steps that are taken
MANY = 8  # pictures of a concept, where it comes as a picture


def gouache(pictures):
    """Pictures [B, H, W, 3] in 0..1 in a hand that the model does not know: four tones from dark blue to cream."""
    tones = (pictures.mean(-1, keepdim=True) * 3).round() / 3
    dark, light = torch.tensor([0.10, 0.12, 0.35]), torch.tensor([1.0, 0.93, 0.75])
    return dark + tones * (light - dark)


def lessons(host):
    """The model's own pictures of all objects, as latents in that other hand, and their prompts."""
    prompts = [with_article(name) for name in OBJECTS]
    made = [sample(host, prompts[i : i + BATCH], range(len(prompts))[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    return host.encode_images(gouache(torch.cat(made))), prompts


def train(host, parameters, steps, rate, latents, prompts, generator):
    """Noise prediction (Ho et al., 2020, eq. 14) on these latents with these encoded prompts."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(steps):
        rows = draw(len(latents), TRAINED_AT_ONCE, generator)
        x_t, t, noise = add_noise(host, latents[rows], generator)
        step_of(optimizer, F.mse_loss(host.predict(x_t, t, prompts[rows]), noise), parameters)


def user_lora(host, latents, texts):
    """The change of weights that a LoRA makes which learned the style `gouache` from pictures of it."""
    generator, prompts = torch.Generator().manual_seed(0), host.encode([f"{text} in gouache style" for text in texts])
    with host.training((TRAINED_AT_ONCE, *host.latent_shape())):
        lora = LoRAs(linears(host), LORA_RANK, generator)
        with lora.attached():
            train(host, list(lora.parameters()), LORA_STEPS, LORA_RATE, latents, prompts, generator)
    return lora_changes(lora)


def tuned(host, latents, texts):
    """The change of weights of a training of the whole UNet on those pictures with plain prompts."""
    generator, prompts = torch.Generator().manual_seed(0), host.encode(texts)
    with host.training((TRAINED_AT_ONCE, *host.latent_shape())):
        return changes_by(host, lambda own: train(host, own, TUNING_STEPS, TUNING_RATE, latents, prompts, generator))


def on_bases(host, classifier, jobs):
    """Prints a row for each base and patch: means over the targets."""
    latents, texts = lessons(host)
    further = tuned(host, latents, texts)
    bases = {
        "the model it was made on": {},
        "beside a user's LoRA": user_lora(host, latents, texts),
        "half of another training": {name: 0.5 * change for name, change in further.items()},
        "another training": further,
    }
    patches = {(preset, job): by_preset(host, *job, preset=preset)[0] for preset in PRESETS for job in jobs}
    asked = {job: pictures_of(job, 1, True) for job in jobs}
    plain = {job: draw_pictures(host, asked[job]) for job in jobs}
    print(f"{'base':26}{'patch':24}{'UA':>8}{'IRA':>8}{'CRA':>8}   drift of kept pictures   of the model's own pictures")
    for base, change in bases.items():
        rows = {"none": [], **{preset: [] for preset in PRESETS}, "fast, made on it": []}
        with applied(host, change):
            for job in jobs:
                own = draw_pictures(host, asked[job])
                moved = np.abs(own.astype(np.float32) - plain[job]).mean() / 255
                seen = see(classifier, own)
                several = {"none": {}, **{preset: patches[preset, job] for preset in PRESETS}}
                several["fast, made on it"] = by_preset(host, *job, preset="fast")[0]
                for patch, weights in several.items():
                    with applied(host, weights):
                        made = draw_pictures(host, asked[job])
                    kept = [i for i, picture in enumerate(asked[job]) if picture.kept]
                    drift = np.abs(made[kept].astype(np.float32) - own[kept]).mean() / 255
                    figures = score(job[0], asked[job], see(classifier, made), seen)
                    rows[patch].append((figures["ua"], figures["ira"], figures["cra"], drift, moved))
        for patch, several in rows.items():
            ua, ira, cra, drift, moved = map(statistics.fmean, zip(*several, strict=True))
            print(f"{base:26}{patch:24}{ua:8.3f}{ira:8.3f}{cra:8.3f}{drift:12.4f}{moved:24.4f}", flush=True)


class WithPicture:
    """A host whose noise estimates of a prompt look at pictures too; those of the empty prompt look at nothing."""

    def __init__(self, host, adapter, tokens):
        self.host, self.adapter, self.tokens = host, adapter, tokens

    def __getattr__(self, name):
        return getattr(self.host, name)

    def predict(self, x_t, t, prompts):
        tokens = torch.zeros_like(self.tokens) if prompts.texts[0] == "" else self.tokens
        with self.adapter.attached(tokens):
            return self.host.predict(x_t, t, prompts)


class PictureAdapter(nn.Module):
    """An IP-Adapter (Ye et al., arXiv 2308.06721, eq. 5): beside a layer's attention to the words, one to tokens made of a
    picture's features, with the same queries and keys and values of its own, which begin as those of the words."""

    def __init__(self, host, features):
        super().__init__()
        self.layers = host.cross_attentions()
        width = next(iter(self.layers.values())).linear("to_k").weight.shape[1]
        self.project = nn.Linear(features, IMAGE_TOKENS * width)
        self.norm = nn.LayerNorm(width)
        weights = {(name, m): layer.linear(m).weight for name, layer in self.layers.items() for m in ("to_k", "to_v")}
        self.weights = nn.ParameterDict({self.key(*at): nn.Parameter(w.detach().clone()) for at, w in weights.items()})

    @staticmethod
    def key(layer, matrix):
        return f"{layer}.{matrix}".replace(".", "/")

    def tokens(self, features):
        """[B, F] -> [B, IMAGE_TOKENS, width]."""
        return self.norm(rearrange(self.project(features), "b (n d) -> b n d", n=IMAGE_TOKENS))

    @contextmanager
    def attached(self, tokens):
        """Context in which every layer attends to the tokens [B, IMAGE_TOKENS, width] too."""
        queries, handles = {}, []

        def keep(name):
            return lambda module, args, output: queries.__setitem__(name, output)

        def look(name, heads):
            def add(module, args):
                q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (queries[name], *pair(name)))
                seen = F.scaled_dot_product_attention(q, k, v)
                return (args[0] + rearrange(seen, "b h n d -> b n (h d)"),)

            return add

        def pair(name):
            return (tokens @ self.weights[self.key(name, matrix)].T for matrix in ("to_k", "to_v"))

        for name, layer in self.layers.items():
            handles.append(layer.linear("to_q").register_forward_hook(keep(name)))
            handles.append(layer.linear("to_out").register_forward_pre_hook(look(name, layer.heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def picture_adapter(host, classifier):
    """An adapter that has learned to draw what a picture shows, from the model's own, half of them without a prompt."""
    generator, texts = torch.Generator().manual_seed(0), [with_article(name) for name in OBJECTS]
    texts = [*texts, *(PROMPT_TEMPLATES[kind].format(name) for kind, (name,) in SHOWN)]
    pictures = torch.cat([sample(host, texts, [1000 * turn + i for i in range(len(texts))]) for turn in (1, 2)])
    features, latents = classifier.features(pictures)[0].clone(), host.encode_images(pictures)
    prompts = host.encode([*texts, ""])
    with host.training((TRAINED_AT_ONCE, *host.latent_shape())):
        adapter = PictureAdapter(host, features.shape[1])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=ADAPTER_RATE)
        for _ in range(ADAPTER_STEPS):
            rows = draw(len(latents), TRAINED_AT_ONCE, generator)
            blank = (torch.rand(TRAINED_AT_ONCE, generator=generator) < 0.5).tolist()
            asked = [len(texts) if without else row % len(texts) for row, without in zip(rows, blank, strict=True)]
            x_t, t, noise = add_noise(host, latents[rows], generator)
            with adapter.attached(adapter.tokens(features[rows])):
                loss = F.mse_loss(host.predict(x_t, t, prompts[asked]), noise)
            step_of(optimizer, loss, adapter.parameters())
    return adapter.requires_grad_(False)


def repainted(host, latents, prompt, strength):
    """img2img: these latents noised to `strength` of the schedule, and denoised from there with the prompt."""
    alphas = host.alphas_cumprod
    timesteps = torch.linspace(strength * (len(alphas) - 1), 0, round(strength * STEPS)).round().long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    x = noised(latents, alphas[timesteps[0]], noise)
    asked, empty = (host.encode([text] * len(latents)) for text in (prompt, ""))
    with host.training(latents.shape), torch.no_grad():
        for i, t in enumerate(timesteps):
            ts = t.repeat(len(x))
            epsilon, without = host.predict(x, ts, asked), host.predict(x, ts, empty)
            epsilon = without + GUIDANCE * (epsilon - without)
            a = alphas[timesteps[i + 1]] if i + 1 < len(timesteps) else torch.ones(())
            x = a.sqrt() * predicted_x0(x, epsilon, alphas[ts]) + (1 - a).sqrt() * epsilon
    return host.decode(x)


def by_picture(host, classifier):
    """Prints how often a concept that a picture brings in is still seen, without and with a patch by `fast`."""
    adapter = picture_adapter(host, classifier)
    print(f"\n{'the concept comes by':44}{'seen without a patch':>22}{'with `fast`':>14}")
    rows = {}
    for kind, (name,) in SHOWN:
        patch = by_preset(host, kind, (name,), preset="fast")[0]
        prompt = PROMPT_TEMPLATES[kind].format(name)
        shown = sample(host, [prompt] * MANY, range(700_000, 700_000 + MANY))
        latents, features = host.encode_images(shown), classifier.features(shown)[0].clone()
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))

        def adapted(text, features=features, noise=noise):
            looking = WithPicture(host, adapter, adapter.tokens(features))
            asked, empty = (host.encode([one] * MANY) for one in (text, ""))
            with host.training(noise.shape), torch.no_grad():
                return host.decode(sample_ddim(looking, noise, asked, empty, steps=STEPS, guidance=GUIDANCE))

        ways = {"its name alone": lambda prompt=prompt: sample(host, [prompt] * MANY, range(MANY))}
        for strength in STRENGTHS:
            ways[f"its name, img2img from it at strength {strength}"] = lambda s=strength, latents=latents, prompt=prompt: (
                repainted(host, latents, prompt, s)
            )
        ways["IP-Adapter, and its name"] = lambda prompt=prompt: adapted(prompt)
        ways["IP-Adapter, and `a picture`"] = lambda: adapted("a picture")
        for way, make in ways.items():
            for context in (nullcontext(), applied(host, patch)):
                with context:
                    names = classifier.names(HEAD[kind], classifier.features(make()))
                rows.setdefault(way, []).append(names.count(name) / MANY)
    for way, shares in rows.items():
        print(f"{way:44}{statistics.fmean(shares[::2]):22.3f}{statistics.fmean(shares[1::2]):14.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bases", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one target")
    parser.add_argument("--parts", nargs="+", choices=("bases", "pictures"), default=["bases", "pictures"])
    options = parser.parse_args()
    host, classifier = model()
    if "bases" in options.parts:
        on_bases(host, classifier, JOBS[:1] if options.quick else JOBS)
    if "pictures" in options.parts:
        by_picture(host, classifier)


if __name__ == "__main__":
    main()
