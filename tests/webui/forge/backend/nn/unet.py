"""ldm's UNet with what Forge's has besides: options and patches in each block, additions in place, its own Linears."""

import torch
from ldm.modules import attention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from standin import strict

from backend.operations import ForgeOperations


class CrossAttention(attention.CrossAttention):
    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        return self.to_out(attention_function(q, k, v, self.heads, mask))


class NoBackward(torch.autograd.Function):
    """As the attention backends without one."""

    @staticmethod
    def forward(ctx, q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("This attention has no backward.")


def attention_function(q, k, v, heads, mask=None):
    return NoBackward.apply(q, k, v, heads)


class BasicTransformerBlock(attention.BasicTransformerBlock):
    options: dict = {}

    def forward(self, x, context=None):
        options = {key: value for key, value in self.options.items() if key not in ("patches", "patches_replace")}
        x += self.attn1(self.norm1(x), transformer_options=options)
        n, value = self.norm2(x), None
        for patch in self.options.get("patches", {}).get("attn2_patch", []):
            n, context, value = patch(n, context, context if value is None else value, options)
        x += self.attn2(n, context=context, value=value, transformer_options=options)
        x_skip = x
        x = self.ff(self.norm3(x))
        x += x_skip
        return x


class IntegratedUNet2DConditionModel(UNetModel):
    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        options = {} if transformer_options is None else transformer_options
        options["original_shape"] = list(x.shape)
        for place, number, index, block in self.transformers:
            block.options = {**options, "block": (place, number), "block_index": index}
        return super().forward(x, timesteps, context, y)


def make(unet):
    """Turns ldm's UNet into Forge's, in place."""
    unet.__class__ = IntegratedUNet2DConditionModel
    unet.transformers = []
    for name, module in list(unet.named_modules()):
        if type(module) is attention.BasicTransformerBlock:
            module.__class__ = BasicTransformerBlock
            parts = name.split(".")
            number = 0 if parts[0] == "middle_block" else int(parts[1])
            unet.transformers.append((parts[0].split("_")[0], number, int(parts[-1]), module))
        elif type(module) is attention.CrossAttention:
            module.__class__ = CrossAttention
        elif type(module) is torch.nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, ForgeOperations.Linear(module))
    return unet


strict(__name__)
