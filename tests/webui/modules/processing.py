import torch
from standin import strict
from standin_processing import Processed, Processing, process_images  # noqa: F401 (the webui's place for them)

from . import shared


class StableDiffusionProcessingTxt2Img(Processing):
    @property
    def alphas_cumprod(self):
        return shared.sd_model.alphas_cumprod

    def guess(self, x, t, sigma):
        def call(x, t, c):
            return shared.sd_model.apply_model(x, t, {"c_crossattn": [c], "c_concat": [x.new_zeros(len(x), 5, 1, 1)]})

        x_t = x / (sigma**2 + 1) ** 0.5
        if self.cfg_scale == 1.0:
            epsilon = call(x_t, t, self.c)
        else:
            if self.c.shape == self.uc.shape and shared.opts.batch_cond_uncond:
                full, without = call(torch.cat([x_t] * 2), torch.cat([t] * 2), torch.cat([self.c, self.uc])).chunk(2)
            else:
                full, without = call(x_t, t, self.c), call(x_t, t, self.uc)
            epsilon = without + self.cfg_scale * (full - without)
        return x - sigma * epsilon


strict(__name__)
