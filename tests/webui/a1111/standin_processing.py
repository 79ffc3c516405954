"""A picture from a prompt: the part of the webuis' processing that scripts and the sampler's callbacks see."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from modules import prompt_parser, shared
from PIL import Image


def evenly_spaced_sigmas(alphas_cumprod, steps):
    """Noise levels [steps + 1] from the schedule's highest to 0, at evenly spaced timesteps."""
    sigmas = (1 / alphas_cumprod.float() - 1).sqrt()
    at = torch.linspace(len(sigmas) - 1, 0, steps).round().long()
    return torch.cat([sigmas[at], torch.zeros(1)]), at


def euler(denoise, x, sigmas, state=None):
    """Euler's method from x [B, C, h, w] at the first noise level to the last; denoise(x, sigma) is x0."""
    for i in range(len(sigmas) - 1):
        if state is not None:
            state.sampling_step = i
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


def noise(shape, seeds):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Sampler:
    def sample(self, p, x, sigmas, timesteps):
        def denoise(x, sigma):
            if shared.state.interrupted:
                from modules.sd_samplers_common import InterruptedException

                raise InterruptedException
            return p.guess(x, timesteps[(sigmas == sigma).nonzero()[0, 0]].repeat(len(x)), sigma)

        return euler(denoise, x, sigmas, shared.state)


@dataclass
class Processing:
    """`StableDiffusionProcessingTxt2Img`; a flavour defines `guess`, and `context` if it samples in one."""

    prompt: str | list[str] = ""
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

    context = torch.no_grad

    @property
    def sd_model(self):
        return shared.sd_model

    def call(self, hook, *args, **kwargs):
        if self.scripts is not None:
            getattr(self.scripts, hook)(self, *args, **kwargs)

    def conds(self, prompts, negative):
        size = {"width": self.width, "height": self.height}
        one_at_a_time = [
            shared.sd_model.get_learned_conditioning(prompt_parser.SdConditioning([p], negative, **size)) for p in prompts
        ]
        longest = max(c.shape[1] for c in one_at_a_time)  # shorter ones repeat their last vector, as the webui's do
        return torch.cat([torch.cat([c, c[:, -1:].repeat(1, longest - c.shape[1], 1)], 1) for c in one_at_a_time])

    def plan(self, hires_steps=None):
        """Of each picture its prompt's parts between AND: (what it is at which steps, weight)."""
        parts, texts, _ = prompt_parser.get_multicond_prompt_list(self.prompts)
        schedules = prompt_parser.get_learned_conditioning_prompt_schedules(texts, self.steps, hires_steps)
        return [[(schedules[number], weight) for number, weight in several] for several in parts]

    def at_step(self, by_part=False):
        """The conditions [R, T, D] of the step at hand, the number of the picture that each is for, and its weight."""
        rows = [
            (n, next(text for end, text in schedule if end > shared.state.sampling_step), weight, part)
            for n, several in enumerate(self.plan(self.steps if self.is_hr_pass else None))
            for part, (schedule, weight) in enumerate(several)
        ]
        rows.sort(key=lambda row: row[3] if by_part else row[0])
        numbers, texts, weights, _ = zip(*rows, strict=True)
        if texts not in self.known:
            self.known[texts] = self.conds(texts, False)
        return self.known[texts], [*numbers], torch.tensor(weights)[:, None, None, None]

    def init(self, all_prompts, all_seeds, all_subseeds):
        """What a kind of processing does once, after the scripts' `process`."""

    def begin_batch(self):
        """What happens to the model before a batch."""

    def begin_sampling(self):
        """What happens to the model before each pass of the sampler."""

    def guess(self, x, t, sigma):
        """The model's x0 under guidance."""
        raise NotImplementedError

    def sample(self, x, sigmas, timesteps):
        self.begin_sampling()
        self.sampler = Sampler()
        self.call("process_before_every_sampling", x=x, noise=x, c=self.c, uc=self.uc)
        return self.sampler.sample(self, x, sigmas, timesteps)

    def sample_batch(self, alphas_cumprod):
        """Latents of one batch: from noise, and with hires fix again from those, larger."""
        sigmas, timesteps = evenly_spaced_sigmas(alphas_cumprod, self.steps)
        self.is_hr_pass = False
        x = self.sample(noise((4, self.height // 8, self.width // 8), self.seeds) * sigmas[0], sigmas, timesteps)
        if self.enable_hr:
            self.is_hr_pass = True
            x = torch.nn.functional.interpolate(x, scale_factor=self.hr_scale, mode="bilinear")
            start = self.steps - max(1, int(self.denoising_strength * self.steps))
            x = x + noise(x.shape[1:], self.seeds) * sigmas[start]
            x = self.sample(x, sigmas[start:], timesteps[start:])
        return x


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
    with p.context():
        p.init(p.all_prompts, p.all_seeds, [0] * len(p.all_seeds))
        for n in range(p.n_iter):
            p.iteration, rows = n, slice(n * p.batch_size, (n + 1) * p.batch_size)
            p.prompts, p.seeds = p.all_prompts[rows], p.all_seeds[rows]
            batch = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": [0] * len(p.seeds)}
            p.call("before_process_batch", **batch)
            p.begin_batch()
            p.call("process_batch", **batch)
            p.known, shared.state.sampling_step = {}, 0
            p.c, p.uc = p.at_step()[0], p.conds([p.negative_prompt] * len(p.prompts), True)
            decoded = shared.sd_model.decode_first_stage(p.sample_batch(p.alphas_cumprod)).clamp(-1, 1) / 2 + 0.5
            p.call("postprocess_batch", decoded, batch_number=n)
            pixels = (decoded * 255).round().byte().movedim(1, -1).cpu().numpy()
            images += [Image.fromarray(one) for one in pixels]
            shared.state.nextjob()
    processed = Processed(images, p.all_prompts[0], [infotext(p, i) for i in range(len(images))])
    p.call("postprocess", processed)
    return processed


def infotext(p, i):
    more = "".join(f", {key}: {value}" for key, value in p.extra_generation_params.items())
    return f"{p.all_prompts[i]}\nSteps: {p.steps}, CFG scale: {p.cfg_scale}, Seed: {p.all_seeds[i]}{more}"
