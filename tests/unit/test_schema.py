"""Patches of schema 1: they read as schema 2 in the new words, and are refused where patches of schema 2 are."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from schema_1 import CAR, CAT, NEW_REPORT, REPORT, SETTINGS, WIDTH, new_stack, old_stack, stored, written

from fmn_core.erasure.config import PRESETS
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.inspection.describe import text_of
from fmn_core.inspection.inspect import inspect_patch
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.gate import gate
from fmn_core.patch.report import ImportReport, PatchReport
from fmn_core.patch.schema import SCHEMA, upgraded
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.summary import summary
from fmn_core.patch.weighted import WeightedPatch


@pytest.fixture(scope="module")
def fresh():
    return new_stack()


@pytest.fixture
def old(fresh):
    """What their stack said of itself in schema 1."""
    return old_stack(fresh, [CAR, CAT])


def test_a_file_of_schema_1_reads_in_the_new_words_with_the_same_figures_and_tensors(tmp_path):
    old, patch = stored(CAR), read_patch(CAR)
    assert old["schema"] == 1, "the test has no point"
    assert patch.info == {
        "schema": SCHEMA,
        **{key: old[key] for key in ("version", "concept", "concepts", "base")},
        "settings": {
            "preset": "fast", "concept_type": "object", "mode": "remove", "preserve": "", "target": "", "template": "",
            "strict": False, "rank": 4, "target_modules": "k,v", "steps": 35, "learning_rate": 0.0, "seed": 0,
            "batch_size": 1, "num_images": 4, "resolution": 0, "num_inference_steps": 20, "guidance_scale": 5.0,
            "horizontal_flip": False, "attack_rounds": 3, "penalized_tokens": "concept", "visual_loss_weight": 0.0,
            "train_layers": "cross_attention",
        },
        "report": {
            "erasure": old["report"]["erased"], "synonyms": old["report"]["also"],
            "preserve_drift": old["report"]["drift"], "empty_prompt_drift": old["report"]["empty prompt"],
            "warnings": old["report"]["warnings"],
        },
        "statistics": old["moments"],
    }  # fmt: skip
    tensors = load_file(CAR)
    assert patch.keys() == tensors.keys() and all(torch.equal(patch[key], value) for key, value in tensors.items())
    assert WeightedPatch(patch).statistics.keys.shape[1] == WIDTH
    save_patch(patch, tmp_path / "new.safetensors")
    assert stored(tmp_path / "new.safetensors") == patch.info == read_patch(tmp_path / "new.safetensors").info


def test_what_a_preset_did_not_read_is_not_told_as_a_choice():
    """Schema 1 wrote down every setting, and `fast` changed K and V alone whatever it said of Q."""
    assert "Settings unlike the preset's" not in text_of(inspect_patch(read_patch(CAR)))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_its_new_name_and_every_value_its_new_word(name):
    new, values = SETTINGS[name]
    for value, word in (values or {"anything": "anything"}).items():
        info = upgraded({"schema": 1, "settings": {"preset": "paper", "concept_type": "custom", name: value}})
        assert info["settings"] == {"preset": "paper", "concept_type": "custom", new: word}
    choices = [f.metadata["choices"] for config in PRESETS.values() for f in fields(config) if f.name == new]
    if name != "preset":
        assert {choice for some in choices for choice in some or ()} == {*values.values()}, "they are today's own"


def test_no_setting_of_today_is_without_an_old_one():
    known = {f.name for config in PRESETS.values() for f in fields(config)} | {"preset"}
    assert {new for new, _ in SETTINGS.values()} == known


@pytest.mark.parametrize("preset", ["fast", "paper", "balanced", "robust"])
def test_settings_say_what_was_in_effect(preset):
    only_k_and_v = preset in ("fast", "balanced")
    for matrices in ("q k v", "q k v out", "k v", "k"):
        given = {"preset": preset, "concept_type": "style", "matrices": matrices, "template": "a photo of {}"}
        found = upgraded({"schema": 1, "settings": given})["settings"]
        modules = "k,v" if only_k_and_v and "q" in matrices else matrices.replace(" ", ",")
        assert found == {"preset": preset, "concept_type": "style", "target_modules": modules, "template": ""}


def test_every_figure_of_a_report_has_its_new_name():
    report = upgraded({"schema": 1, "report": REPORT})["report"]
    assert report == NEW_REPORT and {*report} == {f.name for f in fields(PatchReport)}
    assert {*report["imported"]} == {f.name for f in fields(ImportReport)}
    assert {*report["evaluation"]["settings"]} == {f.name for f in fields(EvaluationConfig)}
    read = PatchReport.read(report)
    assert read.imported.unet_layers == 3 and read.imported.worst_error == 0.3
    assert read.attention_mass["with_unet_lora"] == 0.05 and read.interference[0]["interference"] == 0.2


def test_a_stack_of_schema_1_is_the_stack_of_today_and_its_parts_are_the_patches(fresh, old, tmp_path):
    path = written(tmp_path, old, fresh)
    patch = read_patch(path)
    assert patch.info == json.loads(json.dumps(fresh.info)) and patch.info["settings"]["preserve"] == ""
    assert summary(patch) == summary(fresh) and "Simply added" in summary(patch)
    parts = unstack(patch)
    assert [(part.name, part.strength) for part in parts] == [("car", 1.0), ("cat", 0.5)]
    assert [part.patch.info for part in parts] == [read_patch(file).info for file in (CAR, CAT)]
    again = stack([WeightedPatch(patch), WeightedPatch(read_patch(CAR))])
    assert len(again.info["patches"]) == 2, "a part and its own file are one patch"
    embeds = torch.randn(77, WIDTH, generator=torch.Generator().manual_seed(0))
    assert gate(patch, embeds) == gate(fresh, embeds)


@pytest.mark.parametrize("schema", [0, 3, "1", None, [1], {"1": 1}, 1.5])
def test_other_schemas_are_refused(tmp_path, schema):
    with pytest.raises(ForgetError, match=r"is a patch of schema .*, and this version reads up to 2: update"):
        read_patch(written(tmp_path, stored(CAR) | {"schema": schema}))
