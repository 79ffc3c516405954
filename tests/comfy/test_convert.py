"""Patches from what others made: LoRAs in any spelling, and full weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from spellings import FILE, SPELLINGS, close, ldm_name, module_name, products, written

from demo.host import CHECKPOINT
from fmn_core.convert.config import ImportConfig
from fmn_core.convert.exporter import save_as, to_peft
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.lora.keys import blocks_per_level, dotted, one_name
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP, model_shapes
from fmn_core.patch.summary import summary


@pytest.fixture(scope="module")
def patch():
    return read_patch(FILE)


@pytest.fixture(scope="module")
def deltas(patch):
    return products(patch)


@pytest.fixture(scope="module")
def diffusers_host(pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(pipeline, progress_bar=False)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("on", ["host", "diffusers_host"])
def test_a_lora_in_any_spelling_is_the_same_patch(spelling, on, request, patch, deltas, tmp_path):
    tensors = {}
    for name in patch.modules:
        down, up = SPELLINGS[spelling](name)
        tensors |= {down: patch[name + DOWN], up: patch[name + UP]}
    imported = import_patch(request.getfixturevalue(on), written(tensors, tmp_path / "a.safetensors"), ImportConfig())
    assert imported.modules == patch.modules and imported.rank == patch.rank and close(products(imported), deltas)
    assert imported.info["concept"] == "a" and imported.info["report"]["warnings"] == []
    assert imported.info["report"]["imported"]["error"] < 1e-3


def test_what_peft_exports_comes_back(host, patch, deltas, tmp_path):
    save_as(patch, "peft", tmp_path / "p.safetensors")
    assert all(
        re.fullmatch(r"unet\..*attn2\.to_\w+(\.0)?\.lora_[AB]\.weight", key) for key in load_file(tmp_path / "p.safetensors")
    )
    assert close(products(import_patch(host, tmp_path / "p.safetensors", ImportConfig())), deltas)
    with pytest.raises(ForgetError, match="never overwritten"):
        save_as(patch, "peft", tmp_path / "p.safetensors")


def test_alphas_and_mixed_ranks_are_one_scale_and_one_rank(host, patch, deltas, tmp_path):
    generator, tensors, wanted = torch.Generator().manual_seed(1), {}, {}
    for number, name in enumerate(patch.modules):
        rank, alpha = 1 + number % 5, 0.5 + number
        out, inner = deltas[name].shape
        up, down = torch.randn(out, rank, generator=generator) / 50, torch.randn(rank, inner, generator=generator) / 50
        tensors |= {name + UP: up, name + DOWN: down, name + ALPHA: torch.tensor([alpha] if number % 2 else alpha)}
        wanted[name] = alpha / rank * up @ down
    imported = import_patch(host, written(tensors, tmp_path / "a.safetensors"), ImportConfig())
    assert imported.rank == 5 and close(products(imported), wanted)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    imported = import_patch(host, written(tensors, tmp_path / "b.safetensors"), ImportConfig())
    assert close(products(imported), {name: tensors[name + UP] @ tensors[name + DOWN] for name in wanted})


def test_a_lora_of_more_rank_than_its_matrix_is_kept_whole(host, patch, deltas, tmp_path):
    """Padding 64 layers to a rank that one alone pretends to have would eat the memory."""
    tensors = dict(patch)
    name = patch.modules[0]
    out, inner = deltas[name].shape
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*shape, generator=generator) / 500 for shape in ((out, 5000), (5000, inner)))
    tensors |= {name + UP: up, name + DOWN: down, name + ALPHA: torch.tensor(5000.0)}
    imported = import_patch(host, written(tensors, tmp_path / "a.safetensors"), ImportConfig())
    assert imported.rank == min(out, inner) and close(products(imported), {**deltas, name: up @ down})


@pytest.mark.parametrize("rslora", [False, True])
def test_the_strength_that_peft_keeps_beside_the_tensors_counts(host, patch, deltas, rslora, tmp_path):
    tensors = to_peft(patch)
    special = patch.modules[3]
    config = {"r": 4, "lora_alpha": 2, "use_rslora": rslora, "alpha_pattern": {module_name(special): 12}}
    root = 2 if rslora else 4
    wanted = {name: delta * ((12 if name == special else 2) / root) for name, delta in deltas.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written(tensors, tmp_path / "adapter_model.safetensors")
    assert close(products(import_patch(host, tmp_path, ImportConfig())), wanted)  # the folder is enough
    named = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    assert close(products(import_patch(host, written(tensors, tmp_path / "b.safetensors", named), ImportConfig())), wanted)


def test_what_is_outside_the_cross_attention_becomes_the_unet_lora_and_text_encoders_are_named(host, patch, comfy, tmp_path):
    generator, tensors, layers = torch.Generator().manual_seed(1), dict(patch), host.other_layers()
    names = [next(name for name in layers if part in name) for part in ("attn1_to_k", "resnets_0_conv1", "proj_in")]
    for rank, name in enumerate(names, 2):
        out, *inner = layers[name].weight.shape
        up, down = (
            torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator),
            torch.randn(rank, *inner, generator=generator),
        )
        tensors |= {name + UP: up, name + DOWN: down, name + ALPHA: torch.tensor(3.0)}
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {text + UP: torch.ones(4, 2), text + DOWN: torch.ones(2, 4), text + ALPHA: torch.tensor(2.0)}
    file = written(tensors, tmp_path / "a.safetensors")
    imported = import_patch(host, file, ImportConfig(), "cat")
    assert any(text in line and "left out" in line for line in summary(imported).splitlines())
    assert {key.rpartition(".lora")[0] for key in imported.unet_lora if ALPHA not in key} == set(names)
    assert {tensor.item() for key, tensor in imported.unet_lora.items() if key.endswith(ALPHA)} == {4.0}

    weights = comfy.sd.load_lora_for_models(host.patcher, None, {**imported, **imported.unet_lora}, 1.0, 0)[0]
    theirs = comfy.sd.load_lora_for_models(host.patcher, None, load_file(file), 1.0, 0)[0]
    for name in names + patch.modules[:2]:
        key = next(weight for weight, kohya in host.kohya_names.items() if kohya == name)
        base = comfy.utils.get_attr(host.base, key).float()
        one, other = (comfy.lora.calculate_weight(m.patches[key], base.clone(), key) - base for m in (weights, theirs))
        assert (one - other).norm() < 2e-3 * other.norm(), name
    assert [path.name for path in save_patch(imported, tmp_path / "b.safetensors")] == [
        "b.safetensors",
        "b-unet.safetensors",
    ]


def test_an_imported_patch_is_saved_read_applied_and_measured(host, sample, tmp_path):
    from fmn_core.evaluation.config import EvaluationConfig
    from fmn_core.evaluation.evaluate import evaluate
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.patch.statistics import TextStatistics

    save_as(read_patch(FILE), "peft", tmp_path / "peft.safetensors")
    save_patch(import_patch(host, tmp_path / "peft.safetensors", ImportConfig(), "cat, kitten"), tmp_path / "a.safetensors")
    imported = read_patch(tmp_path / "a.safetensors")
    assert TextStatistics.decoded(imported.info["statistics"]).keys.shape == (16, 112)
    one, other = (sample(apply_patch(host.patcher, p, 1.0), "a cat") for p in (imported, read_patch(FILE)))
    assert (one - other).abs().max() < 0.02 * other.abs().max()
    report = evaluate(host, imported, EvaluationConfig(prompts=1, num_inference_steps=2, resolution=64)).report
    assert report["forgotten"] == {"cat": ["cat", "kitten"]}
    nameless = import_patch(host, tmp_path / "peft.safetensors", ImportConfig())
    assert "statistics" not in nameless.info
    with pytest.raises(ForgetError, match="does not say what it forgets"):
        evaluate(host, nameless, EvaluationConfig())


def full_change(host, rank=6, scale=0.02):
    """kohya name -> a change [out, in] of every k and v, of full rank, that falls off behind the first `rank` directions."""
    generator, changes = torch.Generator().manual_seed(3), {}
    for name, (out, inner) in model_shapes(host).items():
        if name.endswith(("to_k", "to_v")):
            noise = torch.randn(out, inner, generator=generator, dtype=torch.double)
            u, s, vh = torch.linalg.svd(noise, full_matrices=False)
            changes[name] = scale * ((u * torch.exp(-torch.arange(len(s)) / rank)) @ vh).float()
    return changes


def best(changes, rank):
    """Eckart and Young's error at a rank, by the SVD: of all and of the worst."""
    lost, whole, worst = 0.0, 0.0, 0.0
    for delta in changes.values():
        s = torch.linalg.svdvals(delta.double()).square()
        lost, whole, worst = lost + s[rank:].sum(), whole + s.sum(), max(worst, (s[rank:].sum() / s.sum()).sqrt())
    return (lost / whole).sqrt().item(), float(worst)


@pytest.fixture(scope="module")
def changes(diffusers_host):
    return full_change(diffusers_host)


@pytest.mark.parametrize("form", ["diff", "ESD", "ESD, named", "checkpoint"])
def test_full_weights_become_the_best_patch_of_their_rank(form, host, changes, tmp_path):
    base = None
    own = {host.lora_key(layer, matrix): host.weight(layer, matrix).float()
           for layer in host.cross_attentions() for matrix in ("to_q", "to_k", "to_v", "to_out")}  # fmt: skip
    if form == "diff":
        tensors = {f"{name}.diff": delta for name, delta in changes.items()}
    elif form.startswith("ESD"):
        start = "unet." if "named" in form else ""
        tensors = {f"{start}{module_name(name)}.weight": own[name] + changes.get(name, 0) for name in own}
        tensors |= {f"{start}{module_name(name)}.bias": torch.ones(len(own[name])) for name in own if "to_out" in name}
    else:
        tensors, base = load_file(CHECKPOINT), CHECKPOINT
        for name, delta in changes.items():
            key = f"model.diffusion_model.{ldm_name(name)}.weight"
            tensors[key] = tensors[key].float() + delta
    file = written(tensors, tmp_path / "a.safetensors")
    imported = import_patch(host, file, ImportConfig(rank=5), base=base)
    assert imported.modules == sorted(changes) and imported.rank == 5
    report, (every, worst) = imported.info["report"]["imported"], best(changes, 5)
    assert report["error"] == pytest.approx(every, rel=1e-2) and report["worst_error"] == pytest.approx(worst, rel=1e-2)
    found = products(imported)
    lost = sum((found[name] - changes[name]).square().sum() for name in changes)
    assert (lost / sum(delta.square().sum() for delta in changes.values())).sqrt() == pytest.approx(every, rel=1e-2)
    assert ("biases of to_out" in summary(imported)) == form.startswith("ESD")
    assert f"{report['error']:.2%}" in summary(imported)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_least_rank_that_keeps_the_energy_is_found(host, changes, energy, tmp_path):
    file = written({f"{name}.diff": delta for name, delta in changes.items()}, tmp_path / "a.safetensors")
    rank = import_patch(host, file, ImportConfig(energy=energy)).rank
    assert best(changes, rank)[0] ** 2 <= 1 - energy < best(changes, rank - 1)[0] ** 2


def test_a_lora_can_be_truncated_and_a_generous_rank_changes_nothing(host, patch, deltas):
    less, same = (import_patch(host, FILE, ImportConfig(rank=rank)) for rank in (2, 64))
    assert same.rank == 4 and close(products(same), deltas)
    assert less.rank == 2 and less.info["report"]["imported"]["error"] == pytest.approx(best(deltas, 2)[0], rel=1e-3)


def test_weights_that_differ_by_rounding_alone_do_not_differ(host, tmp_path):
    with pytest.raises(ForgetError, match="is that of the model"):
        import_patch(host, CHECKPOINT, ImportConfig())
    exact = {key: tensor.float() for key, tensor in load_file(CHECKPOINT).items()}
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    exact[name] = exact[name] + 0.1
    exact["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"] *= 2
    patch = import_patch(host, written(exact, tmp_path / "a.safetensors"), ImportConfig())
    assert patch.rank == 1 and [module[-4:] for module in patch.modules] == ["to_v"]
    assert "layers outside the cross-attention are left out" in summary(patch)
    patch = import_patch(host, tmp_path / "a.safetensors", ImportConfig(), base=CHECKPOINT)
    assert "1 layers outside the cross-attention differ" in summary(patch)


UNETS = {  # the depths that ComfyUI's own table of names goes by
    "SD1": {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
    "SDXL": {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10},
}  # fmt: skip


@pytest.mark.parametrize("unet", UNETS)
def test_every_layer_of_the_real_models_goes_by_one_name(comfy, unet):
    names = comfy.utils.unet_to_diffusers(UNETS[unet]).items()
    pairs = [(ldm.removesuffix(".weight"), diffusers.removesuffix(".weight")) for diffusers, ldm in names]
    layers = [(ldm, diffusers) for ldm, diffusers in pairs if "block" in ldm and ldm != "input_blocks.0.0"]
    layers = [(ldm, diffusers) for ldm, diffusers in layers if "norm" not in diffusers and not ldm.endswith("bias")]
    assert len(layers) > 250 and blocks_per_level([ldm for ldm, _ in layers]) == 3
    assert blocks_per_level([diffusers for _, diffusers in layers]) == 3
    for ldm, diffusers in layers:
        for spelled in (ldm, f"model.diffusion_model.{ldm}", f"lora_unet_{ldm.replace('.', '_')}", f"unet.{diffusers}"):
            assert one_name(spelled, 3) == diffusers.replace(".", "_")
        assert dotted(diffusers.replace(".", "_")) == diffusers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.update({m.replace("blocks_0", "blocks_7") + UP: torch.ones(2)}), "no layer .*blocks_7"),
        (lambda t, m: t.update({m + DOWN: torch.ones(4, 768)}), "does not fit the model at .*to_k.*768"),
        (lambda t, m: t.pop(m + UP), "only a part of a LoRA at .*to_k"),
        (lambda t, m: t.update({m + UP: torch.full((64, 4), float("nan"))}), "not finite"),
        (lambda t, m: t.update({m + UP: torch.ones(64, 4, dtype=torch.int32)}), "in a form that is no weight"),
        (lambda t, m: t.update({m + ALPHA: torch.ones(3)}), "more than one alpha"),
        (lambda t, m: t.update({m + ALPHA: torch.tensor(1e30)}), "too large"),
        (lambda t, m: t.update({m + ".dora_scale": torch.ones(64)}), "holds `dora_scale`.*merge it"),
        (lambda t, m: t.update({f"unet.{module_name(m)}.lora_B.weight": t[m + UP].clone()}), "second time"),
        (lambda t, m: t.clear(), "changes nothing in the cross-attention"),
        (lambda t, m: [tensor.zero_() for key, tensor in t.items() if UP in key], "all its differences are zero"),
        (lambda t, m: t.update({m + ".diff": torch.ones(3, 3)}), "does not fit the model at .*to_k"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_get_a_sentence_with_their_name(host, patch, change, message, tmp_path):
    tensors = {key: tensor.clone() for key, tensor in patch.items()}
    change(tensors, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k")
    with pytest.raises(ForgetError, match=message):
        import_patch(host, written(tensors, tmp_path / "bad.safetensors"), ImportConfig())


def test_files_of_other_kinds_get_a_sentence(host, tmp_path):
    for name, message in (("a.ckpt", "not a .safetensors"), ("none.safetensors", "not there")):
        with pytest.raises(ForgetError, match=message):
            import_patch(host, tmp_path / name, ImportConfig())
    with pytest.raises(ForgetError, match="no file of weights"):
        import_patch(host, tmp_path, ImportConfig())


def test_a_file_whose_name_has_a_line_break_gives_a_patch_that_can_be_read(host, tmp_path):
    path = tmp_path / "my\ncat.safetensors"
    save_as(read_patch(FILE), "peft", path)
    save_patch(import_patch(host, path, ImportConfig()), tmp_path / "p.safetensors")
    assert read_patch(tmp_path / "p.safetensors").info["concept"] == "my cat"
