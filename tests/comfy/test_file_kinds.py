"""Files that change no cross-attention are refused by what they are; and what a file has of its own kinds of endings."""

from __future__ import annotations

import pytest
import torch
from spellings import FILE, close, ldm_name, module_name, products, written

from fmn_core.convert.config import ImportConfig
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.lora.keys import split_key
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP

K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
BLOCK = "transformer_blocks.0.attn"


@pytest.fixture(scope="module")
def patch():
    return read_patch(FILE)


def of_patch(patch, name, down, up):
    """The patch's factors under others' names."""
    tensors = {name(module) + down: patch[module + DOWN] for module in patch.modules}
    return tensors | {name(module) + up: patch[module + UP] for module in patch.modules}


def full(patch, start=""):
    """Weights of the patch's layers, under diffusers' names, as the UNet's half in a ControlNet has them."""
    return {f"{start}{module_name(name)}.weight": delta for name, delta in products(patch).items()}


ONE = torch.ones(2, 2)
OTHERS = {
    "a Control-LoRA": lambda patch: of_patch(patch, ldm_name, ".down", ".up") | {"lora_controlnet": torch.tensor([])},
    "a ControlNet": lambda patch: full(patch) | {"controlnet_cond_embedding.conv_in.weight": ONE},
    "a ControlNet:": lambda patch: full(patch, "control_model.") | {"control_model.zero_convs.0.0.weight": ONE},
    "a ControlNet-LLLite": lambda _: {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": ONE},
    "an IP-Adapter": lambda _: {"image_proj.proj.weight": ONE, "ip_adapter.1.to_k_ip.weight": ONE},
    "a T2I-Adapter": lambda _: {"body.0.in_conv.weight": ONE, "conv_in.weight": ONE},
    "a T2I-Adapter:": lambda _: {"adapter.body.0.resnets.0.block1.weight": ONE},
    "a GLIGEN": lambda _: {f"input_blocks.1.1.{BLOCK.replace('attn', 'fuser')}.attn.to_k.weight": ONE},
    "a motion module": lambda patch: full(patch) | {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": ONE},
    "for a transformer": lambda _: {f"transformer.{BLOCK}.to_k.lora_A.weight": ONE, f"{BLOCK}2.to_k.lora_A.weight": ONE},
    "for a transformer such as Flux": lambda _: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ONE},
    "for a transformer such as Flux or SD3": lambda _: {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": ONE},
    "a VAE": lambda _: {"encoder.down.0.block.0.conv1.weight": ONE, "post_quant_conv.weight": ONE},
    "a VAE:": lambda _: {"decoder.mid_block.resnets.0.conv1.weight": ONE},
    "a text encoder or its LoRA": lambda _: {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": ONE},
    "a text encoder": lambda _: {"text_model.embeddings.token_embedding.weight": ONE},
    "an embedding": lambda _: {"clip_l": ONE, "clip_g": ONE},
    "an embedding:": lambda _: {"emb_params": ONE},
    "a hypernetwork": lambda _: {"768.0.linear.0.weight": ONE, "768.1.linear.0.weight": ONE},
    "changes nothing in the cross-attention": lambda _: {"something.weight": ONE},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_kind_is_named(what, host, patch, tmp_path):
    with pytest.raises(ForgetError, match=f"^a.safetensors (is )?{what.rstrip(':')}.*: "):
        import_patch(host, written(OTHERS[what](patch), tmp_path / "a.safetensors"), ImportConfig())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("down", "holds `down` at down_blocks_0.*not known here"),
        ("lora_magnitude_vector.default", "is a DoRA"),
        ("b1.weight", "is a GLoRA"),
        ("on_input", "is an .IA.³"),
        ("oft_blocks", "is an OFT"),
        ("scale_weight", "is quantised weights"),
        ("weight_scale", "is quantised weights"),
        ("comfy_quant", "is quantised weights"),
        ("weight.absmax", "is quantised weights"),
        ("weight.quant_state.bitsandbytes__nf4", "is quantised weights"),
        ("strange.weight", "holds `strange.weight` at down_blocks_0.*not known here"),
    ],
)
def test_an_unknown_part_of_a_known_layer_is_named(part, message, host, patch, tmp_path):
    tensors = full(patch) | {f"{K}.{part}": torch.ones(2)}
    with pytest.raises(ForgetError, match=f"a.safetensors.*{message}.*import that"):
        import_patch(host, written(tensors, tmp_path / "a.safetensors"), ImportConfig())


def test_two_adapters_of_one_layer_are_no_layer_of_another_model(host, patch, tmp_path):
    tensors = of_patch(patch, module_name, ".lora_A.one.weight", ".lora_B.one.weight")
    tensors |= of_patch(patch, module_name, ".lora_A.two.weight", ".lora_B.two.weight")
    with pytest.raises(ForgetError, match="two.weight beside .*one.weight.*second time"):
        import_patch(host, written(tensors, tmp_path / "a.safetensors"), ImportConfig())


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.update({m + DOWN: torch.ones(2, 7)}),
        lambda t, m: t.update({m + DOWN: torch.full_like(t[m + DOWN], float("nan"))}),
        lambda t, m: t.update({m + UP: t[m + UP] * 1e30}),
        lambda t, m: t.pop(m + UP),
        lambda t, m: t.update({m + ".something": torch.ones(2)}),
        lambda t, m: t.update({m + ".hada_w1_a": torch.ones(2)}),
        lambda t, m: t.update({m.replace("lora_unet", "lycoris") + UP: torch.ones(2)}),
    ],
)
def test_no_layer_outside_the_attention_refuses_a_file(change, host, patch, tmp_path):
    good, bad = [name for name in host.other_layers() if "attn1_to_k" in name][:2]
    tensors = dict(patch)
    for name in (good, bad):
        out, inner = host.other_layers()[name].weight.shape
        tensors |= {name + UP: torch.ones(out, 2), name + DOWN: torch.ones(2, inner), name + ALPHA: torch.tensor(2.0)}
    change(tensors, bad)
    imported = import_patch(host, written(tensors, tmp_path / "a.safetensors"), ImportConfig())
    assert close(products(imported), products(patch)) and {key.split(".")[0] for key in imported.unet_lora} == {good}
    assert bad.removeprefix("lora_unet_") in "\n".join(imported.info["report"]["warnings"])


def test_what_peft_says_of_a_lokr_of_whole_matrices_is_its_strength(host, patch, tmp_path):
    """Its tensors have no rank, and others pass over its alpha."""
    name = patch.modules[0]
    out, inner = products(patch)[name].shape
    one, other = torch.randn(4, 4), torch.randn(out // 4, inner // 4)
    layer = f"base_model.model.{module_name(name)}"
    tensors = {f"{layer}.lokr_w1": one, f"{layer}.lokr_w2": other}
    for config, scale in (("", 1), ('{"r": 8, "alpha": 4}', 0.5), ('{"r": 8, "alpha": 4, "rank_pattern": {"to_k": 2}}', 2)):
        told = {"lora_adapter_metadata": config} if config else None
        file = written(tensors, tmp_path / f"{scale}.safetensors", told)
        found = products(import_patch(host, file, ImportConfig(energy=1.0)))
        assert close(found, {name: torch.kron(one, other) * scale})


def test_a_layer_is_found_before_what_is_in_it():
    known = {"a.to_k", "a", "b_to_k"}.__contains__
    for key, found in {
        "a.to_k.lora_A.x.weight": ("a.to_k", "down"), "a.to_k.what.weight": ("a.to_k", ".what.weight"),
        "a.to_k.down": ("a.to_k", ".down"),
        "a.to_k_lora.up.weight": ("a.to_k", "up"), "b_to_k.lokr_w2_a": ("b_to_k", "lokr_w2_a"),
        "a.to_v.weight": ("a", ".to_v.weight"), "c.to_v.weight": ("c.to_v", "weight"), "c": ("c", ""),
        f"a.to_k.{'x.' * 9}weight": (f"a.to_k.{'x.' * 9}"[:-1], "weight"),
    }.items():  # fmt: skip
        assert split_key(key, known) == found
