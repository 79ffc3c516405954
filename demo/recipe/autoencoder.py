"""The autoencoder: TAESD's layout, narrow while it trains, padded with zeros to TAESD's 64 channels when saved."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from fmn_core.hosts.webui.taesd import WIDTH, make_decoder, make_encoder

WIDTHS = (16, 32, 64, 64)  # at 128, 64, 32 and 16 pixels
SCALE = 0.18215  # SD1's latent scale: the UNet sees latents of unit variance, the hosts divide and multiply by it


class Autoencoder(nn.Module):
    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.encoder, self.decoder = make_encoder(widths), make_decoder(widths)

    def encode(self, pictures):
        """Bytes [B, H, W, 3] to latents [B, 4, H/8, W/8]."""
        return self.encoder(pictures.movedim(-1, 1).float() / 255)

    def decode(self, latents):
        """Latents [B, 4, h, w] to pictures [B, 8h, 8w, 3] in 0..1."""
        return self.decoder(latents).clamp(0, 1).movedim(1, -1)


def slopes(x):
    return x.diff(dim=-1), x.diff(dim=-2)


def reconstruction_loss(decoded, pictures):
    """L1 + 2 MSE + 0.3 L1 of the slopes + L1 of the mean colour of every latent's 8 x 8 pixels.

    Without the last, four channels go to outlines and leave hues to chance. What lies beyond 0 or 1 where the picture
    is at 0 or 1 costs nothing.
    """
    decoded = torch.where((pictures <= 0) & (decoded < 0) | (pictures >= 1) & (decoded > 1), pictures, decoded)
    edges = sum(F.l1_loss(a, b) for a, b in zip(slopes(decoded), slopes(pictures), strict=True))
    colours = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(pictures, 8))
    return F.l1_loss(decoded, pictures) + 2 * F.mse_loss(decoded, pictures) + 0.3 * edges + colours


def train_autoencoder(model, pictures, run, batch=16, crop=64, rate=2e-3):
    """Trains on random crops of `pictures` [N, H, W, 3] bytes, aligned to the latents; `run` is a train.Run.

    The latents are kept at unit variance by a penalty, and noise of 0.1 is added to them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=1e-4, eps=1e-7)
    for step in run.steps(model, optimizer, lambda done: rate * run.cosine(done)):
        index = run.integers(len(pictures), (batch,))
        top, left = (8 * run.integers((pictures.shape[1] - crop) // 8 + 1, (1,)).item() for _ in range(2))
        real = torch.from_numpy(pictures[index.numpy(), top : top + crop, left : left + crop])
        real = real.to(run.device).movedim(-1, 1).float() / 255
        with run.autocast():
            latents = model.encoder(real)
            noise = 0.1 * run.normal(latents.shape)
            decoded = model.decoder(latents + noise)
        loss = reconstruction_loss(decoded.float(), real)
        latents = latents.float()
        spread = (latents.std((0, 2, 3)) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        run.backward(loss + 0.05 * spread)
        run.update(step, loss=loss.item())


@torch.no_grad()
def encode_all(model, pictures, run, batch=32):
    """Latents [N, 4, h, w] fp16 of all pictures [N, H, W, 3] bytes."""
    latents = []
    for start in tqdm(range(0, len(pictures), batch), desc="latents"):
        part = torch.from_numpy(pictures[start : start + batch]).to(run.device)
        with run.autocast():
            latents.append(model.encode(part).half().cpu())
    return torch.cat(latents)


@torch.no_grad()
def normalise(model, latents):
    """Folds the latents' mean and spread [4] into the encoder's last layer; returns the new latents.

    The decoder's first layer is told too, but its clamp lies between: `train_decoder` mends the rest.
    """
    mean, spread = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    view = (slice(None), None, None)
    latents = ((latents.float() - mean[view]) / spread[view]).half()
    last, first = model.encoder[-1], model.decoder[1]
    mean, spread = mean.to(last.weight.device), spread.to(last.weight.device)
    last.weight.div_(spread[:, None, None, None])
    last.bias.sub_(mean).div_(spread)
    first.bias.add_((first.weight.sum((2, 3)) * mean).sum(1))
    first.weight.mul_(spread[None, :, None, None])
    return latents


def train_decoder(model, pictures, latents, run, batch=6, rate=1e-3):
    """Trains the decoder on the finished latents [N, 4, h, w] of whole pictures [N, H, W, 3], with noise of 0.1."""
    optimizer = torch.optim.AdamW(model.decoder.parameters(), rate, betas=(0.9, 0.98), weight_decay=1e-4, eps=1e-7)
    for step in run.steps(model.decoder, optimizer, lambda done: rate * run.cosine(done)):
        index = run.integers(len(pictures), (batch,))
        real = torch.from_numpy(pictures[index.numpy()]).to(run.device).movedim(-1, 1).float() / 255
        known = latents[index].to(run.device).float()
        with run.autocast():
            decoded = model.decoder(known + 0.1 * run.normal(known.shape))
        loss = reconstruction_loss(decoded.float(), real)
        run.backward(loss)
        run.update(step, loss=loss.item())


@torch.no_grad()
def psnr(model, pictures, device):
    """Peak signal to noise in dB of `pictures` [N, H, W, 3] bytes encoded and decoded."""
    real = torch.from_numpy(pictures).to(device)
    error = (model.decode(model.encode(real)) - real.float() / 255).square().mean()
    return -10 * torch.log10(error).item()


def read_narrow(weights):
    """The Autoencoder of a state dict that `padded` made: the same function in a fraction of the time."""
    model = Autoencoder()
    narrow = model.state_dict()
    model.load_state_dict({name: weights[name][tuple(map(slice, weight.shape))] for name, weight in narrow.items()})
    return model.eval()


def padded(weights):
    """Zero-pads a narrow state dict to TAESD's 64 channels."""
    full = Autoencoder((WIDTH,) * 4).state_dict()
    for name, weight in full.items():
        weight.zero_()
        weight[tuple(slice(size) for size in weights[name].shape)] = weights[name]
    return full
