"""A picture from a prompt: the part of the webui's processing that scripts and the sampler's callbacks see."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from standin import euler, karras_free_sigmas, noise, strict

from . import devices, prompt_parser, shared
from .sd_samplers_common import InterruptedException


@dataclass
class StableDiffusionProcessingTxt2Img:
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 1
    steps: int = 4
    cfg_scale: float = 7.0
    width: int = 128
    height: int = 128
    batch_size: int = 1
    n_iter: int = 1
    enable_hr: bool = False
    hr_scale: float = 2.0
    denoising_strength: float = 0.7
    scripts: object = None
    script_args: list = field(default_factory=list)
    extra_generation_params: dict = field(default_factory=dict)
    is_hr_pass: bool = False
    iteration: int = 0

    @property
    def sd_model(self):
        return shared.sd_model

    def call(self, hook, *args, **kwargs):
        if self.scripts is not None:
            getattr(self.scripts, hook)(self, *args, **kwargs)

    def conds(self, prompts, negative):
        size = {"width": self.width, "height": self.height}
        with devices.autocast():
            one_at_a_time = [
                shared.sd_model.get_learned_conditioning(prompt_parser.SdConditioning([p], negative, **size))
                for p in prompts
            ]
        longest = max(c.shape[1] for c in one_at_a_time)  # shorter ones repeat their last vector, as the webui's do
        return torch.cat([torch.cat([c, c[:, -1:].repeat(1, longest - c.shape[1], 1)], 1) for c in one_at_a_time])

    def sample(self, x, cond, uncond, sigmas, timesteps):
        model, batch = shared.sd_model, len(x)

        def call(x, t, c):
            return model.apply_model(x, t, {"c_crossattn": [c], "c_concat": [x.new_zeros(len(x), 5, 1, 1)]})

        def denoise(x, sigma):
            if shared.state.interrupted:
                raise InterruptedException
            t = timesteps[(sigmas == sigma).nonzero()[0, 0]].repeat(batch)
            scaled = x / (sigma**2 + 1) ** 0.5
            if self.cfg_scale == 1.0:
                epsilon = call(scaled, t, cond)
            elif cond.shape == uncond.shape and shared.opts.batch_cond_uncond:
                full, without = call(torch.cat([scaled] * 2), torch.cat([t] * 2), torch.cat([cond, uncond])).chunk(2)
                epsilon = without + self.cfg_scale * (full - without)
            else:
                full, without = call(scaled, t, cond), call(scaled, t, uncond)
                epsilon = without + self.cfg_scale * (full - without)
            return x - sigma * epsilon

        return euler(denoise, x, sigmas, shared.state)


@dataclass
class Processed:
    images: list
    prompt: str
    infotexts: list


def process_images(p) -> Processed:
    p.all_prompts = p.prompt if isinstance(p.prompt, list) else [p.prompt] * p.batch_size * p.n_iter
    p.all_seeds = [p.seed + i for i in range(len(p.all_prompts))]
    shared.state.job_count = p.n_iter
    images = []
    p.call("process")
    with torch.no_grad():
        for n in range(p.n_iter):
            p.iteration, rows = n, slice(n * p.batch_size, (n + 1) * p.batch_size)
            p.prompts, p.seeds = p.all_prompts[rows], p.all_seeds[rows]
            batch = {"batch_number": p.iteration, "prompts": p.prompts, "seeds": p.seeds, "subseeds": [0] * len(p.seeds)}
            p.call("before_process_batch", **batch)
            p.call("process_batch", **batch)
            p.c, p.uc = p.conds(p.prompts, False), p.conds([p.negative_prompt] * len(p.prompts), True)
            decoded = shared.sd_model.decode_first_stage(sample_batch(p)).clamp(-1, 1)
            p.call("postprocess_batch", decoded / 2 + 0.5, batch_number=p.iteration)
            pixels = ((decoded / 2 + 0.5) * 255).round().byte().movedim(1, -1).cpu().numpy()
            images += [Image.fromarray(one) for one in pixels]
            shared.state.nextjob()
    processed = Processed(images, p.all_prompts[0], [infotext(p, i) for i in range(len(images))])
    p.call("postprocess", processed)
    return processed


def sample_batch(p):
    """Latents of one batch: from noise, and with hires fix again from those, larger."""
    sigmas, timesteps = karras_free_sigmas(shared.sd_model.alphas_cumprod, p.steps)
    x = noise((4, p.height // 8, p.width // 8), p.seeds) * sigmas[0]
    p.is_hr_pass = False
    p.call("process_before_every_sampling", x=x, noise=x, c=p.c, uc=p.uc)
    x = p.sample(x, p.c, p.uc, sigmas, timesteps)
    if p.enable_hr:
        p.is_hr_pass = True
        x = torch.nn.functional.interpolate(x, scale_factor=p.hr_scale, mode="bilinear")
        start = len(sigmas) - 1 - max(1, int(p.denoising_strength * p.steps))
        x = x + noise(x.shape[1:], p.seeds) * sigmas[start]
        p.call("process_before_every_sampling", x=x, noise=x, c=p.c, uc=p.uc)
        x = p.sample(x, p.c, p.uc, sigmas[start:], timesteps[start:])
    return x


def infotext(p, i):
    more = "".join(f", {key}: {value}" for key, value in p.extra_generation_params.items())
    return f"{p.all_prompts[i]}\nSteps: {p.steps}, CFG scale: {p.cfg_scale}, Seed: {p.all_seeds[i]}{more}"


strict(__name__)
