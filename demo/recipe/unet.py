"""The UNet: SD1's blocks in smaller widths, trained to predict the noise in the latents."""

import copy

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch import nn

from .text_encoder import CONFIG as TEXT

WIDTHS = (64, 128, 192)  # at 16, 8 and 4 latent pixels
HEADS = 4
NO_PROMPT = 0.1  # how often a picture is shown without its caption, for classifier-free guidance
MOST_SNR, MOST_WEIGHT = 5, 20  # of the loss's weights
BETAS = (0.00085, 0.012)


def make_unet() -> UNet2DConditionModel:
    """SD1's UNet with one residual block a level and cross-attention at every one."""
    levels = len(WIDTHS)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=TEXT["hidden_size"],
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
    )
    unet.set_attn_processor(AttnProcessor())  # on a CPU with heads of 16 channels faster than the fused one
    return unet


def make_schedule() -> DDIMScheduler:
    """SD1's noise schedule: 1,000 scaled-linear betas from 0.00085 to 0.012, epsilon prediction."""
    return DDIMScheduler(
        beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


class MasterWeights:
    """A bfloat16 copy that computes, for fp32 weights that learn; the model itself where bf16 is off."""

    def __init__(self, model, make, run):
        self.model, self.copy = model, model
        if run.bf16:
            self.copy = make().to(run.device, torch.bfloat16)

    def take_gradients(self):
        """Moves the copy's gradients to the weights that learn."""
        if self.copy is not self.model:
            for weight, copy in zip(self.model.parameters(), self.copy.parameters(), strict=True):
                weight.grad, copy.grad = copy.grad.float(), None

    @torch.no_grad()
    def refresh(self):
        """Copies the weights that learn, for the next step."""
        if self.copy is not self.model:
            torch._foreach_copy_(list(self.copy.parameters()), list(self.model.parameters()))


class Average(nn.Module):
    """Two models in one checkpoint: the one that learns, and the moving average of its weights, which draws better."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        super().__init__()
        self.learning, self.average, self.decay = model, copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.learning.parameters()), share)


def train_unet(unet, latents, contexts, captions, run, batch=32, rate=1e-3, show=None):
    """Trains on latents [N, 4, 16, 16] with captions [N, K], rows of contexts [M, 77, D], row 0 the empty prompt.

    Returns the moving average of the weights, which `show(unet, step)` sees now and then too.

    Noise prediction weighted by min(SNR + 1, 5) / SNR, 20 at most: as velocity prediction weights it (Salimans and Ho
    2022, section 4), cut at low noise as in Hang et al. 2023, section 3.4. Without the 1, high noise, where a prompt
    decides what the picture is, counts for next to nothing.
    """
    schedule = make_schedule()
    snr = schedule.alphas_cumprod.to(run.device)
    snr = snr / (1 - snr)
    weight = ((snr + 1).clamp(max=MOST_SNR) / snr).clamp(max=MOST_WEIGHT)
    master = MasterWeights(unet, make_unet, run)
    dtype = next(master.copy.parameters()).dtype
    channels = torch.channels_last
    master.copy.to(memory_format=channels)
    optimizer = torch.optim.AdamW(unet.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4, foreach=True)
    both = Average(unet)
    see = show and (lambda step: show(both.average, step))
    for step in run.steps(both, optimizer, lambda done: rate * run.cosine(done), see):
        master.refresh()
        index = run.integers(len(latents), (batch,))
        rows = captions[index, run.integers(captions.shape[1], (batch,))]
        rows = torch.where(torch.rand(batch, generator=run.dice) < NO_PROMPT, 0, rows)
        clean = latents[index].to(run.device).float()
        noise, t = run.normal(clean.shape), run.integers(1000, (batch,)).to(run.device)
        noisy = schedule.add_noise(clean, noise, t).to(dtype, memory_format=channels)
        guess = master.copy(noisy, t, contexts[rows].to(run.device, dtype)).sample.float()
        loss = (weight[t] * (guess - noise).square().mean((1, 2, 3))).mean()
        run.backward(loss)
        master.take_gradients()
        run.update(step, loss=loss.item())
        both.update(step)
    return both.average


@torch.no_grad()
def sample(unet, contexts, nothing, seeds, steps=20, guidance=3.0):
    """DDIM samples [B, 4, 16, 16] for contexts [B, 77, D] against the empty prompt's [77, D], a seed for each."""
    schedule = make_schedule()
    schedule.set_timesteps(steps)
    device = contexts.device
    noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    x = torch.stack(noise).to(device)
    both = torch.cat([nothing.expand_as(contexts), contexts])
    for t in schedule.timesteps:
        empty, full = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        x = schedule.step(empty + guidance * (full - empty), t, x).prev_sample
    return x


def sheet(pictures, columns) -> np.ndarray:
    """Pictures [B, H, W, 3] in 0..1 in rows of `columns`, as bytes."""
    return rearrange((pictures * 255).round().byte().cpu().numpy(), "(r c) h w x -> (r h) (c w) x", c=columns)
