"""What the webui puts into a loaded model, and onto classes."""

import ldm.modules.attention
import torch
from einops import rearrange
from ldm.models.diffusion.ddpm import LatentDiffusion
from standin import EmbeddingDatabase, EmbeddingsWithFixes, strict

from . import devices
from .sd_hijack_clip import FrozenCLIPEmbedderWithCustomWords


class Attention(torch.autograd.Function):
    """As xformers' kernels are for heads too wide: the forward is there, the backward is not."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        return (torch.einsum("bid,bjd->bij", q, k) * scale).softmax(-1) @ v

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("This attention has no backward.")


def optimized_forward(self, x, context=None, mask=None, **kwargs):
    context = x if context is None else context
    q, k, v = (
        rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    return self.to_out(rearrange(Attention.apply(q, k, v, self.scale), "(b h) n d -> b n (h d)", h=self.heads))


plain_forward = ldm.modules.attention.CrossAttention.forward
plain_apply_model = LatentDiffusion.apply_model


def apply_model(self, x_noisy, t, cond, **kwargs):
    """The webui's wrapper: everything in the UNet's dtype, under autocast."""
    if isinstance(cond, dict):
        cond = {key: [one.to(devices.dtype_unet) for one in several] for key, several in cond.items()}
    with devices.autocast():
        return plain_apply_model(self, x_noisy.to(devices.dtype_unet), t.to(devices.dtype_unet), cond, **kwargs)


class StableDiffusionModelHijack:
    fixes = None

    def __init__(self):
        self.embedding_db = EmbeddingDatabase()

    def apply_optimizations(self, option=None):
        ldm.modules.attention.CrossAttention.forward = optimized_forward

    def undo_optimizations(self):
        ldm.modules.attention.CrossAttention.forward = plain_forward

    def hijack(self, model):
        encoder = model.cond_stage_model
        embeddings = getattr(encoder.transformer, "text_model", encoder.transformer).embeddings
        embeddings.token_embedding = EmbeddingsWithFixes(embeddings.token_embedding, self)
        model.cond_stage_model = FrozenCLIPEmbedderWithCustomWords(encoder, self)
        LatentDiffusion.apply_model = apply_model
        self.apply_optimizations()


model_hijack = StableDiffusionModelHijack()
strict(__name__)
