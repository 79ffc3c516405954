import math

import torch
from standin import strict
from standin_processing import Processed, Processing  # noqa: F401 (the webui's place for it)
from standin_processing import process_images as process

from . import sd_models, shared


class StableDiffusionProcessingTxt2Img(Processing):
    """Forge's objects are made anew for each batch and each pass of the sampler, with the LoRAs on them."""

    context = torch.inference_mode

    @property
    def alphas_cumprod(self):
        return shared.sd_model.forge_objects.unet.model.predictor.alphas_cumprod

    def begin_batch(self):
        model = shared.sd_model
        model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()

    begin_sampling = begin_batch

    def guess(self, x, t, sigma):
        from backend import memory_management

        unet = shared.sd_model.forge_objects.unet
        memory_management.load_models_gpu([unet])
        c, of, weights = self.at_step(by_part=True)
        parts = len(c) // len(x)
        kinds = [0] if self.cfg_scale == 1.0 else [1] + [0] * parts  # the unconditional rows come first
        conds = [c, self.uc][: len(kinds)]
        length = math.lcm(*(each.shape[1] for each in conds))
        conds = [each.repeat(1, length // each.shape[1], 1) for each in conds[::-1]]
        sigmas = sigma.repeat(len(x))
        rows = [range(i * len(x), (i + 1) * len(x)) for i in range(len(kinds))]
        options = {
            **unet.model_options["transformer_options"],
            "cond_or_uncond": kinds,
            "cond_indices": [row for kind, several in zip(kinds, rows, strict=True) if not kind for row in several],
            "uncond_indices": [row for kind, several in zip(kinds, rows, strict=True) if kind for row in several],
            "sigmas": sigmas,
        }
        out = unet.model.apply_model(
            torch.cat([x] * len(kinds)), torch.cat([sigmas] * len(kinds)), c_crossattn=torch.cat(conds),
            transformer_options=options,
        )  # fmt: skip
        if self.cfg_scale == 1.0:
            return out
        without, full = out.split([len(x), len(c)])
        return without.index_add(0, torch.tensor(of), self.cfg_scale * weights * (full - without[of]))


def process_images(p):
    sd_models.forge_model_reload()
    return process(p)


strict(__name__)
