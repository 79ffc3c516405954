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
        kinds = [0] if self.cfg_scale == 1.0 else [1, 0]  # the unconditional rows come first
        conds = [self.uc if kind else self.c for kind in kinds]
        length = math.lcm(*(c.shape[1] for c in conds))
        conds = [c.repeat(1, length // c.shape[1], 1) for c in conds]
        sigmas = sigma.repeat(len(x))
        rows = [list(range(i * len(x), (i + 1) * len(x))) for i in range(len(kinds))]
        options = {
            **unet.model_options["transformer_options"],
            "cond_or_uncond": kinds,
            "cond_indices": rows[kinds.index(0)],
            "uncond_indices": rows[kinds.index(1)] if 1 in kinds else [],
            "sigmas": sigmas,
        }
        out = unet.model.apply_model(
            torch.cat([x] * len(kinds)), torch.cat([sigmas] * len(kinds)), c_crossattn=torch.cat(conds),
            transformer_options=options,
        ).chunk(len(kinds))  # fmt: skip
        full, without = out[kinds.index(0)], out[kinds.index(1)] if 1 in kinds else None
        return full if without is None else without + self.cfg_scale * (full - without)


def process_images(p):
    sd_models.forge_model_reload()
    return process(p)


strict(__name__)
