"""SDXL in the webui, whose sgm is in no registry: ldm's UNet in SDXL's shape, inside what the adapter knows of sgm's engine.

Run by tests/webui/test_webui_hosts.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from standin import Chunker, EmbeddingDatabase
from torch import nn

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.host import MATRICES
from fmn_core.hosts.webui.model import WebuiHost, adapt

VECTOR = 12


class Encoder(Chunker, nn.Module):
    """One of the two: the second has open_clip's tokenizer, which is no attribute of it."""

    def __init__(self, tokenizer, width, first):
        nn.Module.__init__(self)
        self.hijack, self.table, self.first = SimpleNamespace(fixes=None), nn.Embedding(49408, width), first
        self.wrapped = nn.Module()
        setattr(self.wrapped, "transformer" if first else "model", self.table)
        self.database, self.words = EmbeddingDatabase(), tokenizer
        if first:
            self.tokenizer = tokenizer
        self.fixes_owner = self.hijack
        self.id_start, self.id_end, self.id_pad = 49406, 49407, 49407 if first else 0

    def tokenize(self, texts):
        return self.words(texts, truncation=False, add_special_tokens=False)["input_ids"]

    def encode_with_transformers(self, tokens):
        assert self.first or tokens.shape[1] == 77
        rows = self.table(tokens)  # causal, as CLIP is
        return rows.cumsum(1) / torch.arange(1, rows.shape[1] + 1)[:, None]

    def forward(self, texts):
        return self.encode_texts(texts)


class DiffusionEngine(nn.Module):
    is_sd1 = is_sd2 = is_sd3 = False
    is_sdxl, parameterization = True, "eps"

    def __init__(self, tokenizer, like):
        super().__init__()
        self.model, self.conditioner = nn.Module(), nn.Module()
        self.conditioner.embedders = nn.ModuleList(
            [Encoder(tokenizer, 16, True), Encoder(tokenizer, 24, False), nn.Identity()]
        )
        self.model.diffusion_model = unet = UNetModel(
            image_size=16, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[2, 4], num_res_blocks=2,
            channel_mult=[1, 2, 4], num_head_channels=16, use_spatial_transformer=True, context_dim=40, legacy=False,
            use_linear_in_transformer=True, use_checkpoint=False, num_classes="continuous",
        )  # fmt: skip
        unet.label_emb = nn.Linear(VECTOR, 128)
        for parameter in unet.parameters():
            nn.init.normal_(parameter, std=0.05)
        self.alphas_cumprod, self.sd_checkpoint_info = like.alphas_cumprod, SimpleNamespace(model_name="tiny-xl")

    def get_learned_conditioning(self, prompts):
        parts = [encoder(list(prompts)) for encoder in self.conditioner.embedders[:2]]
        sizes = torch.tensor([prompts.height, prompts.width]).float() / 1024
        return {"crossattn": torch.cat(parts, -1), "vector": torch.cat([sizes, parts[1][0, -1, : VECTOR - 2]])[None]}

    def apply_model(self, x, t, cond):
        return self.model.diffusion_model(x, t, context=cond["crossattn"], y=cond["vector"])


@pytest.fixture(scope="module")
def xl(webui):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = adapt(DiffusionEngine(webui.engines[0].tokenizer, webui.sd_model).eval())
    host.resolution = 64
    return host


def test_names_are_sgms(xl):
    assert isinstance(xl, WebuiHost) and xl.family == "sdxl" and xl.per_level == 3
    names = {xl.lora_key(layer, matrix) for layer in xl.cross_attentions() for matrix in MATRICES}
    blocks = [f"input_blocks_{i}_1" for i in (4, 5, 7, 8)] + ["middle_block_1"] + [f"output_blocks_{i}_1" for i in range(6)]
    ends = ("to_q", "to_k", "to_v", "to_out_0")
    assert names == {f"lora_unet_{block}_transformer_blocks_0_attn2_{end}" for block in blocks for end in ends}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in xl.other_layers()
    assert adapt(xl.sd_model).latent_shape() == (4, 128, 128)


def test_two_encoders_are_one_axis(xl):
    texts = ["a cat", "a (red:1.3) rose", "rose " * 80]
    prompts = xl.encode(texts)
    assert prompts.prompt_embeds.shape == (3, 154, 40) and prompts.pooled_prompt_embeds.shape == (3, VECTOR)
    assert prompts.pooled_prompt_embeds[:, :2].tolist() == [[64 / 1024] * 2] * 3
    assert torch.allclose(xl.encode_prefix(texts, 9), prompts.prompt_embeds[:, :9], atol=1e-6)
    assert [token.text for token in xl.tokenize("a cat")][1:3] == ["a</w>", "cat</w>"]


def test_the_vector_reaches_the_unet_and_gradients_the_adapters(xl):
    prompts, x, t = xl.encode(["a cat", "a dog"]), torch.ones(2, 4, 8, 8), torch.tensor([9, 500])
    layer = next(iter(xl.cross_attentions().values())).linear("to_v")
    with xl.training(x.shape):
        delta = torch.zeros_like(layer.weight, requires_grad=True)
        hook = layer.register_forward_hook(lambda m, args, out: out + args[0] @ delta.T)
        estimate = xl.predict(x, t, prompts)
        estimate.square().sum().backward()
        hook.remove()
        assert delta.grad.abs().sum() > 0
        assert not torch.allclose(xl.predict(x, t, prompts[[1, 0]]), estimate)


def test_a_concept_can_be_forgotten(xl):
    patch, _ = forget(xl, "cat", make_config(preset="fast"))
    assert set(patch.modules) < {xl.lora_key(layer, matrix) for layer in xl.cross_attentions() for matrix in MATRICES}


def test_words_cannot_be_learned_and_it_is_said(xl):
    with pytest.raises(ForgetError, match="cannot learn words"):
        xl.token_embeddings("cat")
    with pytest.raises(ForgetError, match="cannot learn words"):
        xl.encode_with_embeddings("a {}", {})
