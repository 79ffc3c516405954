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
        c, of, weights = self.at_step()
        if self.cfg_scale == 1.0:
            epsilon = call(x_t, t, c)
        else:
            if c.shape[1:] == self.uc.shape[1:] and shared.opts.batch_cond_uncond:
                both = call(torch.cat([x_t[of], x_t]), torch.cat([t[of], t]), torch.cat([c, self.uc]))
                full, without = both.split([len(of), len(x_t)])
            else:
                full, without = call(x_t[of], t[of], c), call(x_t, t, self.uc)
            epsilon = without.index_add(0, torch.tensor(of), self.cfg_scale * weights * (full - without[of]))
        return x - sigma * epsilon


strict(__name__)
