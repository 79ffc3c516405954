import torch
from standin import strict


class Prediction(torch.nn.Module):
    prediction_type = "epsilon"

    def __init__(self, alphas_cumprod):
        super().__init__()
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    def timestep(self, sigma):
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0)


class KModel(torch.nn.Module):
    def __init__(self, unet, alphas_cumprod):
        super().__init__()
        self.storage_dtype = self.computation_dtype = torch.float32
        self.diffusion_model, self.predictor = unet, Prediction(alphas_cumprod)

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        sigma = t.view(-1, 1, 1, 1)
        scaled = (x / (sigma**2 + 1) ** 0.5).to(self.computation_dtype)
        steps, context = self.predictor.timestep(t).float(), c_crossattn.to(self.computation_dtype)
        out = self.diffusion_model(scaled, steps, context=context, transformer_options=transformer_options, **kwargs).float()
        return x - out * sigma

    def memory_required(self, input_shape):
        return input_shape[0] * input_shape[2] * input_shape[3] * 16384


strict(__name__)
