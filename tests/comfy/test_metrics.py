"""The figures of an evaluation are those of their formulas."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from fmn_core.errors import ForgetError
from fmn_core.evaluation.evaluate import classified
from fmn_core.evaluation.metrics import adversarial_token, clip_scores, kv_drift, kv_targets, prompt_drift
from fmn_core.evaluation.prompts import Probe, Subjects
from fmn_core.patch.apply import patch_factors
from fmn_core.patch.file import read_patch
from fmn_core.training.noise import noise_drift


@pytest.fixture(scope="module")
def patch():
    return read_patch(ROOT / "demo/loras/forget-cat.safetensors")


def test_kv_drift_is_the_formula(host, patch):
    """A column, a layer and a matrix at a time, from whole matrices in fp64."""
    factors, columns = patch_factors(host, patch), {"a": torch.randn(3, 112), "b": torch.randn(2, 112)}
    drift = kv_drift(host, factors, columns)
    for name, several in columns.items():
        ratios = []
        for layer in host.cross_attentions():
            for matrix in ("to_k", "to_v"):
                up, down = factors[layer, matrix]
                W, delta = host.weight(layer, matrix).double(), up.double() @ down.double()
                ratios += [((delta @ c).norm() / (W @ c).norm()).item() for c in several.double()]
        assert drift[name] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)


def test_the_adversarial_token_is_the_least_squares_solution(host, patch):
    factors, columns, ridge = patch_factors(host, patch), torch.randn(3, 112, dtype=torch.double), 1e-3
    W = torch.cat([host.weight(*target).double() for target in kv_targets(host)])
    patched = W + torch.cat([factors[target][0].double() @ factors[target][1].double() for target in kv_targets(host)])
    own = (ridge * (W.T @ W).diagonal().mean()).sqrt() * torch.eye(112, dtype=torch.double)
    wanted = torch.cat([W @ columns.T, torch.zeros(112, 3, dtype=torch.double)])
    found = torch.linalg.lstsq(torch.cat([patched, own]), wanted).solution
    left, taken = ((patched @ x - W @ columns.T).square().sum() for x in (found, columns.T))
    figures = adversarial_token(host, factors, columns, ridge)
    assert figures["recovered"] == pytest.approx((1 - left / taken).item(), rel=1e-6)
    assert figures["length"] == pytest.approx((found.norm(dim=0) / columns.norm(dim=1)).mean().item(), rel=1e-6)


def test_nothing_gets_through_a_patch_that_takes_all_away(host):
    factors = {target: (-host.weight(*target).float(), torch.eye(112)) for target in kv_targets(host)}
    assert abs(adversarial_token(host, factors, torch.randn(2, 112))["recovered"]) < 1e-3
    assert kv_drift(host, factors, {"": torch.randn(2, 112)})[""] == pytest.approx(1, rel=1e-4)


def test_drifts_are_ratios_of_energies():
    before, empty = torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 1.0)
    after = torch.full((1, 2, 2), 2.5)
    assert noise_drift(after, before).item() == pytest.approx(0.25 / 4)
    assert prompt_drift(after, before, empty).item() == 0.25
    assert prompt_drift(empty, before, empty).item() == 1  # as if the prompt had been empty


def test_classified_shares_are_those_of_the_benchmark():
    from benchmarks.prompts import Picture
    from benchmarks.quality import score

    pictures = [Picture("a cat", 0, "cat"), Picture("a cat", 1, "cat"), Picture("a dog", 500_000, "dog"),
                Picture("neon", 500_001, style="neon"), Picture("sepia", 500_002, style="sepia")]  # fmt: skip
    objects, styles = ["dog", "cat", "dog", "bus", "bus"], ["", "", "", "neon", "clay"]
    made = torch.zeros(5, 2, 2, 3)
    seen = {"object": objects, "style": styles, "person": [""] * 5}
    expected = score("object", pictures, seen, seen)
    probes = [
        Probe(group, p.prompt, p.object or p.style, (p.object or p.style,), "object" if p.object else "style")
        for group, p in zip(("concept", "concept", "near", "kept", "kept"), pictures, strict=True)
    ]
    subjects = Subjects({"cat": ("cat",)}, (), "object", ())
    figures = classified(lambda _: list(zip(objects, styles, strict=True)), made, probes, subjects)
    assert figures == {key: pytest.approx(expected[key]) for key in ("ua", "ira", "cra", "h")}


def test_clip_score_and_accuracy():
    pictures = torch.eye(3)[:, None, None, :].expand(-1, 2, 2, -1)  # red, green, blue
    colours = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "grey": [1.0, 1, 1]}

    def scorer(images, texts):
        return F.normalize(images.mean((1, 2)), dim=1) @ F.normalize(torch.tensor([colours[t] for t in texts]), dim=1).T

    scores, right = clip_scores(scorer, pictures, ["red", "grey", "red"], ["red", "green", "grey"])
    assert scores.tolist() == pytest.approx([1, 3**-0.5, 0]) and right.tolist() == [True, False, False]


def test_clip_vision_compares_with_a_text_encoder_of_its_own_space_only(loaded, monkeypatch, tmp_path):
    from comfy.clip_vision import ClipVisionModel

    from fmn_core.hosts.comfy.clip import clip_scorer

    config = tmp_path / "vision.json"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config.write_text(json.dumps(sizes | {"hidden_act": "gelu", "image_size": 28, "patch_size": 14, "num_channels": 3,
                                          "projection_dim": 112, "model_type": "clip_vision_model"}))  # fmt: skip
    vision, clip = ClipVisionModel(str(config)), loaded[1]
    for parameter in vision.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ForgetError, match="width 112, without its projection"):
        clip_scorer(clip, vision)
    encoder = clip.cond_stage_model.clip_l
    monkeypatch.setattr(encoder, "return_projected_pooled", True)
    monkeypatch.setattr(encoder, "options_default", (*encoder.options_default[:2], True))
    monkeypatch.setitem(encoder.transformer._modules, "text_projection", torch.nn.Identity())
    pictures = torch.rand(2, 40, 30, 3, generator=torch.Generator().manual_seed(0))
    cosines = clip_scorer(clip, vision)(pictures, ["a cat", "a house", "a cat"])
    assert cosines.shape == (2, 3) and cosines.abs().max() <= 1 and torch.equal(cosines[:, 0], cosines[:, 2])
    assert (cosines[:, 0] - cosines[:, 1]).abs().min() > 1e-4
    with torch.no_grad():
        seen = vision.encode_image(pictures)["image_embeds"]
        said = clip.encode_from_tokens(clip.tokenize("a house"), return_pooled=True)[1]
    assert torch.allclose(cosines[:, 1], F.cosine_similarity(seen, said), atol=1e-5)


def test_a_clip_folder_of_transformers_scores_pictures(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from demo.recipe.text_encoder import make_tokenizer
    from fmn_core.evaluation.clip import load_clip

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = sizes | {"bos_token_id": 49406, "eos_token_id": 49407}
        config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16)
        CLIPModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    scorer = load_clip(str(tmp_path))
    pictures = torch.rand(3, 40, 30, 3, generator=torch.Generator().manual_seed(0))
    cosines = scorer(pictures, ["a cat", "a long sentence about a house"])
    assert cosines.shape == (3, 2) and cosines.abs().max() <= 1 and len(set(cosines.flatten().tolist())) == 6
    assert torch.allclose(scorer(pictures[1:2], ["a cat"]), cosines[1:2, :1], atol=1e-6)
