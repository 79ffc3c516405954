"""The benchmarks run, and their figures mean what they say."""

from __future__ import annotations

import json
import pickle
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from benchmarks import ablation, grid, quality
from benchmarks.ablation import PARTS
from benchmarks.grid import GRID, HELD_OUT, label
from benchmarks.imagined_steps import IMAGINED, imagined_step
from benchmarks.k_resteering import MASS, separability, steered_keys
from benchmarks.live_tensors import Imagined, imagine
from benchmarks.methods import METHODS, replaced, without_vocabulary
from benchmarks.prompts import TARGETS, Picture, asked_for, kept
from benchmarks.quality import score
from demo.classifier import LABELS
from demo.vocabulary import OBJECTS, STYLES
from fmn_core.erasure import closed_form as fast
from fmn_core.erasure.config import PRESETS
from fmn_core.text import features as paraphrases
from fmn_core.training.memory import RECOMPUTED, estimate_memory


def test_the_figures_are_those_of_the_definitions():
    pictures = [
        Picture("a cat", 0, "cat", group="plain"), Picture("a cat, neon", 1, "cat", "neon", group="in a style"),
        Picture("a dog", 500_000, "dog", group="neighbour"), Picture("a fox", 500_002, "fox", group="neighbour"),
        Picture("a car, neon", 500_001, "car", "neon", group="other"),
        Picture("a catt", 2, "cat", group="misspelling"),
    ]  # fmt: skip
    before = {"object": ["cat", "cat", "dog", "fox", "car", ""], "style": [*[""] * 4, "neon", ""], "person": [""] * 6}
    now = {"object": ["dog", "cat", "dog", "cat", "bus", ""], "style": [*[""] * 4, "neon", ""], "person": [""] * 6}
    figures = score("object", pictures, now, before)
    assert (figures["ua"], figures["ira"], figures["cra"]) == (0.5, pytest.approx(1 / 3), 1.0)
    assert figures["h"] == pytest.approx(3 / (2 + 3 + 1))
    assert figures["groups"] == {"plain": 1.0, "in a style": 0.0, "misspelling": 1.0}
    assert figures["kept"] == {"neighbour": 0.5, "other": 0.0}
    assert figures["worst_neighbour"] == {"name": "fox", "loss": 1.0, "pictures": 1}


@pytest.mark.parametrize(("kind", "name"), [("object", "cat"), ("style", "neon"), ("identity", "ada")])
@pytest.mark.parametrize("few", [False, True])
def test_prompts_name_the_target_and_kept_ones_do_not(kind, name, few):
    asked, others = asked_for(kind, (name,), 0, few), kept(kind, (name,), 0, few)
    synonyms = OBJECTS["cat"].synonyms.split()
    assert all(any(word[:3] in p.prompt for word in [name, *synonyms]) for p in asked)
    assert others and not any(name in (p.object, p.style, p.person) for p in others)
    assert not any(p.kept for p in asked) and all(p.kept for p in others)
    assert len({p.seed for p in asked + others}) == len(asked + others)
    assert {p.style for p in others} <= {"", *STYLES} and set(LABELS) == {"object", "style", "person"}
    unseen = {"other template", "paraphrase", "composition", "long description", "misspelling"}
    assert unseen <= {p.group for p in asked}


def test_every_preset_is_a_method_and_every_method_travels_to_a_worker():
    assert set(PRESETS) < set(METHODS)
    for method in (*METHODS.values(), *PARTS.values()):
        again = pickle.loads(pickle.dumps(method))
        assert getattr(again, "func", again) is getattr(method, "func", method)


def test_words_withheld_are_nowhere_in_the_word_lists_and_come_back():
    words = paraphrases.WORDS
    with replaced(without_vocabulary()):
        assert not {*OBJECTS, "kitten"} & set(paraphrases.WORDS["object"]) and "neon" not in paraphrases.WORDS["style"]
        assert not any("boat" in caption.split() for caption in paraphrases.CAPTIONS)
    assert paraphrases.WORDS is words


@pytest.mark.parametrize("part", [name for name, method in PARTS.items() if "instead" in getattr(method, "keywords", {})])
def test_a_part_taken_away_is_one_that_the_code_has(part):
    instead = PARTS[part].keywords["instead"]
    with replaced(instead):
        assert all(hasattr(fast, path.split(".")[-1]) for path in instead if path.startswith(f"{fast.__name__}."))


def test_the_steered_key_gets_its_share_of_the_start_tokens_attention():
    generator = torch.Generator().manual_seed(0)
    queries = 3 + torch.randn(2, 500, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    start = torch.randn(2, 8, generator=generator).double()
    logits = (queries @ (steered_keys(queries, start) - start)[..., None])[..., 0] / 8**0.5
    assert torch.allclose(logits.mean(1).exp(), torch.tensor(MASS).double())
    assert torch.allclose((logits.mean(1) / logits.std(1)).abs(), separability(queries), rtol=1e-2)


def test_the_grid_tries_each_combination_on_two_targets_and_the_better_third_on_all(monkeypatch):
    asked = []

    def benchmark(several, jobs, **how):
        asked.extend((name, job) for job in jobs for name in several)
        figure = {name: method.keywords["lamb"] + method.keywords["expand"] for name, method in several.items()}
        return [
            {"method": name, "kind": job[0], "targets": list(job[1]), "h": figure[name]}
            | {"ua": 1.0, "ira": 1.0, "cra": 1.0, "drift": 0.0, "worst_neighbour": {"name": "", "loss": 0.0, "pictures": 0}}
            for job in jobs
            for name in several
        ]

    monkeypatch.setattr(grid, "benchmark", benchmark)
    best = grid.grid("UCE", 1, None)
    assert len(asked) == 16 * 2 + 6 * 2 and len(best) == 6
    assert "expand" in best[0]["method"] and "0.5" in best[0]["method"] and best[0]["h"] == 1.5
    assert len({label(name, one) for name, several in GRID.items() for one in several}) == 64
    assert not {name for _, (name,) in HELD_OUT} & {name for names in TARGETS.values() for name in names}


def test_the_ablation_runs_each_part_on_its_jobs_and_prints_them(monkeypatch, capsys):
    def benchmark(parts, jobs, *how):
        figures = {"ua": 1.0, "ira": 0.5, "cra": 1.0, "h": 0.75, "drift": 0.1, "groups": {"plain": 1.0}, "kept": {}}
        figures["worst_neighbour"] = {"name": "dog", "loss": 0.25, "pictures": 4}
        return [{"method": name, "kind": jobs[0][0], "targets": ["cat"], **figures} for name in parts]

    monkeypatch.setattr(ablation, "benchmark", benchmark)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--quick"])
    ablation.main()
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{part:28}") == 2 for part in PARTS) and "dog -0.250 of 4" in printed


def test_the_curve_asks_for_what_is_forgotten_and_for_the_rest(monkeypatch, tmp_path):
    seen = {"object": "cat", "style": "neon", "person": "ada"}
    classifier = types.SimpleNamespace(features=len, names=lambda head, count: [seen[head]] * count)
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(quality, "model", lambda: (None, classifier))
    monkeypatch.setattr(quality, "applied", lambda host, weights: nullcontext())
    monkeypatch.setattr(quality, "draw", lambda host, pictures: np.zeros((len(pictures), 1, 1, 3), np.uint8))
    rows = quality.curve({"none": lambda host, kind, names: ({}, 0)}, 1, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows and len(rows) == 2 * len(quality.CURVE)
    monkeypatch.setattr(quality, "draw", None)  # what stands in the file is not drawn again
    assert quality.curve({"none": None}, 1, tmp_path / "rows.json") == rows
    rows = [row for row in rows if row["method"] == "none"]
    assert [len(row["targets"]) for row in rows] == list(quality.CURVE) and quality.CURVE[-1] == len(OBJECTS) // 2
    assert [row["ua"] for row in rows[:2]] == [0.0, 0.5] and {row["ira"] for row in rows} == {0.0}
    assert {row["cra"] for row in rows} == {1.0} and {row["drift"] for row in rows} == {0.0}


def test_shapes_alone_take_as_many_bytes_as_tensors_do():
    def work():
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.SiLU(), torch.nn.Conv2d(16, 4, 3))
        with Imagined(layers.parameters()) as live:
            out = layers(torch.randn(2, 3, 32, 32))
            if torch.isfinite(out).all():
                out.square().mean().backward()
        return live.peak

    with imagine():
        imagined = work()
    assert imagined == work() > 2 * 16 * 30 * 30 * 4


def test_the_estimate_is_near_what_a_step_holds():
    """On SD1.5's UNet at its real size, at 256 pixels; the whole gradient's decides whether blocks are recomputed."""
    held = {}

    def rehearsed(host, prompts, latents):
        held.update(estimate_memory(host, latents, torch.zeros(1, dtype=torch.long), prompts[[0]]).held)

    with imagine():
        imagined_step("sd1", 256, torch.float32, rehearsed)
    for gradient, name, near in (("full", "paper", 0.25), (RECOMPUTED, "paper, recomputed", 0.5)):
        with imagine():
            peak, weights = imagined_step("sd1", 256, torch.float32, IMAGINED[name])
        assert held[gradient] == pytest.approx(peak - weights, rel=near), gradient
