"""What an evaluation measures, that it measures right, and that it leaves the model alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from demo.run import load_pictures
from demo.server import ServerError
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.evaluation.evaluate import evaluate, with_evaluation
from fmn_core.evaluation.findings import findings
from fmn_core.evaluation.plot import GAP, HEADING, LABEL, MARGIN, TILE, draw_report
from fmn_core.evaluation.prompts import subjects_of
from fmn_core.evaluation.recovery import recover
from fmn_core.patch.apply import applied
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import UP, Patch

QUICK = EvaluationConfig(prompts=2, num_inference_steps=2, resolution=64, preserve="house", inversion_steps=2)
MEASURES = ("prompt_drift", "noise_drift", "kv_drift", "picture_change")


@pytest.fixture(scope="module")
def host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def patch():
    return read_patch(ROOT / "demo/loras/forget-cat.safetensors")


@pytest.fixture(scope="module")
def evaluation(host, patch):
    return evaluate(host, patch, QUICK)


@pytest.fixture(scope="module")
def at_strength_0(host, patch):
    return evaluate(host, patch, replace(QUICK, strength=0.0))


def nothing(patch):
    return Patch({name: torch.zeros_like(t) if name.endswith(UP) else t for name, t in patch.items()}, patch.info)


def assert_untouched(host, before):
    for (parameter, values), now in zip(before, host.base.parameters(), strict=True):
        assert now is parameter and torch.equal(now, values) and now.grad is None and now.is_inference()
    assert not any(m._forward_hooks for m in host.base.modules())


@pytest.mark.parametrize("how", ["zeros", "strength 0"])
def test_a_patch_that_does_nothing_changes_nothing_and_withstands_nothing(host, patch, at_strength_0, how):
    report = (evaluate(host, nothing(patch), QUICK) if how == "zeros" else at_strength_0).report
    assert all(group["mean"] == 0 for measure in MEASURES for group in report[measure].values())
    assert all(mass["after"] == mass["before"] > 0 for mass in report["attention"].values())
    assert report["adversarial_token"]["recovered"] == 1
    assert report["warnings"][0].startswith("Little effect: what prompts of `cat` do changes by 0.0%")


def test_a_good_patch_moves_the_concept_and_little_else(evaluation):
    report = evaluation.report
    for measure in MEASURES:
        concept, *others = (report[measure][group]["mean"] for group in ("concept", "near", "kept", "unrelated"))
        assert concept > 2 * max(others) > 0, measure
    assert report["attention"]["own_tokens"]["after"] < report["attention"]["own_tokens"]["before"]
    assert report["noise_drift"]["empty"]["mean"] < 1e-4 and report["warnings"] == []
    assert list(report["kv_drift"]["kept"]["each"]) == ["house"] and "cat" not in str(report["prompts"]["unrelated"])


def test_the_same_inputs_give_the_same_report_without_pictures_too_and_the_model_is_left_alone(patch, evaluation, loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    blind = ComfyHost(*loaded[:2], None)
    before = [(p, p.detach().clone()) for p in blind.base.parameters()]
    again = evaluate(blind, patch, QUICK)
    same = [key for key in evaluation.report if key not in ("picture_change", "summary")]
    assert {key: again.report[key] for key in same} == {key: evaluation.report[key] for key in same}
    assert again.pictures is None and again.report["picture_change"] is None and draw_report(again).shape[2] == 3
    assert all(torch.equal(*pair) for pair in zip(again.latents, evaluation.latents, strict=True))
    assert_untouched(blind, before)


def test_an_interrupt_leaves_the_model_alone(host, patch, monkeypatch):
    before, calls = [(p, p.detach().clone()) for p in host.base.parameters()], []

    def stop():
        calls.append(bool(next(iter(host.cross_attentions().values())).module.to_k._forward_hooks))
        if calls[-1]:
            raise InterruptedError

    monkeypatch.setattr(host, "check_interrupt", stop)
    with pytest.raises(InterruptedError):  # while the patch is on
        evaluate(host, patch, QUICK)
    assert len(calls) > 3
    assert_untouched(host, before)


def test_a_patch_applied_by_hooks_is_what_the_hosts_own_loader_makes_of_it(host, patch, sample, loaded):
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    merged = ComfyHost(apply_patch(loaded[0], patch, 0.7), *loaded[1:])
    x, t, prompts = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), None
    estimates = []
    for one, strength in ((merged, 0.0), (host, 0.7), (host, 0.0)):
        prompts = prompts or one.encode(["a cat"])
        with one.training(x.shape), torch.no_grad(), applied(one, patch, strength):
            estimates.append(one.predict(x, t, prompts))
    by_loader, by_hooks, base = estimates
    assert (by_loader - by_hooks).abs().max() < 1e-4 < (by_loader - base).abs().max()


def test_the_report_is_saved_with_the_patch(patch, evaluation, tmp_path):
    save_patch(with_evaluation(patch, evaluation.report), tmp_path / "p.safetensors")
    again = read_patch(tmp_path / "p.safetensors")
    assert again.info["report"]["evaluation"] == evaluation.report == json.loads(json.dumps(evaluation.report))
    assert again.info["report"]["erasure"] == patch.info["report"]["erasure"] and "evaluation" not in patch.info["report"]
    assert all(torch.equal(again[name], tensor) for name, tensor in patch.items())


def test_sentences_name_the_figures_above_their_limits(evaluation):
    report = json.loads(json.dumps(evaluation.report))
    report["prompt_drift"]["concept"]["each"]["cat"] = 0.2
    report["prompt_drift"]["kept"]["each"]["house"] = 0.4
    report["noise_drift"]["empty"]["mean"] = 0.05
    report["inversion"] = {"recovery": 0.75, "m_score": {"before": 0.9, "after": 0.7}}
    said = findings(report)
    for line, words in zip(said["warnings"], ("`cat` do changes by 20%", "`house` 40%", "5.0%", "75%"), strict=True):
        assert words in line
    assert "Forget again with them in `preserve`" in said["warnings"][1]
    assert "in the patch's `preserve` already: apply it less" in findings(report, preserved=("house",))["warnings"][1]
    assert said["summary"].startswith("\n".join(said["warnings"])) and "M-Score 0.900 before, 0.700 after" in said["summary"]


def test_the_picture_shows_the_same_seeds_before_and_after(evaluation, at_strength_0):
    def row(drawn, number):
        top = MARGIN + 64 + HEADING + number * (TILE + GAP)
        return drawn[top : top + TILE, MARGIN + LABEL :]

    drawn, same = draw_report(evaluation), draw_report(at_strength_0)
    assert drawn.min() >= 0 and drawn.max() <= 1 and torch.equal(row(same, 0), row(same, 1))
    assert torch.equal(row(drawn, 0), row(same, 0))
    assert (row(drawn, 0)[:, :TILE] - row(drawn, 1)[:, :TILE]).abs().mean() > 0.01


def test_words_learned_through_no_patch_are_those_learned_without(host, patch):
    with host.sized(QUICK.resolution):
        figures, latents = recover(host, nothing(patch), subjects_of(patch), QUICK)
    losses = figures["losses"]
    assert figures["m_score"]["drop"] == 0 and figures["recovery"] == 1 and latents.shape == (4, 4, 8, 8)
    assert losses["base, name"] == losses["patched, name"] and losses["base, learned"] == losses["patched, learned"]


def test_inversion_through_a_patch_is_part_of_the_report(host, patch):
    settings = replace(QUICK, prompts=1, inversion=True)
    judged = evaluate(host, patch, settings, classifier=lambda pictures: ["cat"] * len(pictures))
    inversion = judged.report["inversion"]
    assert 0 <= inversion["recovery"] <= 1 and inversion["m_score"]["drop"] != 0
    assert inversion["recognised"] == 1 and judged.report["classifier"]["after"]["ua"] == 0
    assert len(judged.recovered) == 4 and f"bring back {inversion['recovery']:.0%}" in judged.report["summary"]


def test_learned_words_bring_back_what_a_patch_takes_from_the_name(patch, loaded, monkeypatch):
    from fmn_core.evaluation import recovery
    from fmn_core.hosts.comfy.model import ComfyHost

    monkeypatch.setattr(recovery, "ANCHORS", 4)
    monkeypatch.setattr(recovery, "SHOWN_PICTURES", 1)
    settings = EvaluationConfig(num_inference_steps=8, inversion_steps=30)
    figures, _ = recover(ComfyHost(*loaded), patch, subjects_of(patch), settings)
    losses = figures["losses"]
    assert losses["base, name"] < losses["patched, learned"] < losses["patched, name"] and 0 < figures["recovery"] < 1
    assert figures["m_score"]["after"] < figures["m_score"]["before"] < 1


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"concepts": []}, QUICK, "does not say what it forgets"),
        ({}, replace(QUICK, preserve="dog, Cat"), "`Cat` is what the patch forgets"),
    ],
)
def test_what_cannot_be_measured_gets_a_sentence(host, patch, change, settings, message):
    with pytest.raises(ForgetError, match=message):
        evaluate(host, Patch(dict(patch), patch.info | change), settings)


def test_the_mode_correct_measures_the_word_that_moves(patch):
    info = patch.info | {"settings": patch.info["settings"] | {"mode": "correct", "target": "tiger"}}
    subjects = subjects_of(Patch(dict(patch), info))
    assert subjects.names == {"tiger": ("tiger",)} and "cat" in subjects.preserve


def test_the_node_reports_in_a_real_server(server):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    known = server.get("object_info")["FMN_EvaluatePatch"]["input"]["required"]
    defaults = {name: spec[1]["default"] for name, spec in known.items() if "default" in spec[1]}
    forgetting = server.get("object_info")["FMN_ForgetConcept"]["input"]["required"]
    forget = {name: spec[1]["default"] for name, spec in forgetting.items() if "default" in spec[1]}
    workflow = {
        "1": node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors"),
        "2": node("FMN_ForgetConcept", model=["1", 0], clip=["1", 1], **forget),
        "3": node("FMN_EvaluatePatch", model=["1", 0], clip=["1", 1], vae=["1", 2], lora=["2", 0], **defaults
                  | {"prompts": 1, "num_inference_steps": 3, "resolution": 64, "preserve": "house"}),
        "4": node("PreviewImage", images=["3", 1]),
        "5": node("FMN_SavePatch", lora=["3", 0], filename_prefix="evaluated"),
        "6": node("PreviewAny", source=["3", 2]),
    }  # fmt: skip
    events = []
    outputs = server.run(workflow, lambda kind, data: events.append((kind, data)))
    report = json.loads(outputs["6"]["text"][0])
    assert outputs["3"]["text"][0] == report["summary"] and "`cat`: what its prompts do" in report["summary"]
    name = outputs["5"]["text"][0].split()[-1]
    assert read_patch(Path(name)).info["report"]["evaluation"] == report
    assert load_pictures(server, outputs["4"]["images"]).shape[3] == 3
    steps = [(d["value"], d["max"]) for k, d in events if k == "progress" and d["node"] == "3"]
    assert steps == sorted(steps) and steps[-1] == (6, 6)
    workflow["3"]["inputs"]["preserve"] = "cat"
    with pytest.raises(ServerError, match="`cat` is what the patch forgets"):
        server.run(workflow)
