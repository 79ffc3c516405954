"""Patches of schema 1: they read as schema 2 in the new words, and are refused where patches of schema 2 are."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn_core.erasure.config import PRESETS
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.inspection.describe import text_of
from fmn_core.inspection.inspect import inspect_patch
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.gate import gate
from fmn_core.patch.report import ImportReport, PatchReport
from fmn_core.patch.schema import SCHEMA, check_info, upgraded
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.summary import summary
from fmn_core.patch.weighted import WeightedPatch

CAR, CAT = (ROOT / f"demo/loras/forget-{name}.safetensors" for name in ("car", "cat"))
WIDTH = 112  # of the demo model's text encoder

# Every setting of schema 1: its name in schema 2, and the new word for each value that is chosen from a list.
SETTINGS = {
    "concept_type": ("concept_type", {kind: kind for kind in ("object", "style", "identity", "custom")}),
    "preset": ("preset", {preset: preset for preset in ("fast", "paper", "balanced", "robust")}),
    "mode": ("mode", {mode: mode for mode in ("remove", "replace", "correct")}),
    "replacement": ("target", {}),
    "keep": ("preserve", {}),
    "strict": ("strict", {}),
    "steps": ("steps", {}),
    "learning_rate": ("learning_rate", {}),
    "seed": ("seed", {}),
    "rank": ("rank", {}),
    "tokens": (
        "penalized_tokens",
        {"concept": "concept", "concept and end": "concept_and_end", "concept onward": "concept_onward"},
    ),
    "matrices": ("target_modules", {"q k v": "q,k,v", "k v": "k,v", "k": "k", "v": "v", "q k v out": "q,k,v,out"}),
    "template": ("template", {}),
    "batch_size": ("batch_size", {}),
    "visual_weight": ("visual_loss_weight", {}),
    "num_pictures": ("num_images", {}),
    "resolution": ("resolution", {}),
    "sampling_steps": ("num_inference_steps", {}),
    "guidance": ("guidance_scale", {}),
    "flip": ("horizontal_flip", {}),
    "rounds": ("attack_rounds", {}),
    "layers": ("train_layers", {"cross-attention": "cross_attention", "whole unet": "whole_unet"}),
    "gradient": ("backprop", {"whole": "full", "residual stream": "skip_connections"}),
    "loss": ("loss", {"squared norms": "squared_norms", "joint norm": "joint_norm"}),
}

# Every key that a report of schema 1 can have, and the same report in schema 2.
REPORT = {
    "erased": {"cat": 0.9}, "also": ["kitten"], "drift": {"dog": 0.1}, "empty prompt": 0.01,
    "attention_mass": {"before": 0.3, "after": 0.1, "with rest": 0.05},
    "distance": {"before": 1.0, "fast": 0.5, "after": 0.2}, "noise drift": 0.02, "unrelated drift": 0.003,
    "error with learned words": [0.4, 0.5], "steps": 35, "strength": 1.1, "loss": [2.0, 1.0],
    "conflicts": [{"concept": "cat", "other": "dog", "share": 0.2}],
    "responses": [{"concept": "cat", "added": 0.2, "jointly": 0.1}], "spill": 0.4,
    "imported": {
        "file": "x.safetensors", "kind": "LoRA", "rest": 3, "rest_error": 0.2, "rank": 4, "projections": 20, "error": 0.1,
        "worst": {"projection": "lora_unet_x", "error": 0.3},
    },
    "evaluation": {
        "summary": "Fine.", "warnings": [], "prompt_drift": {"near": {"mean": 0.1, "each": {"dog": 0.1}}},
        "settings": {
            "keep": "dog", "prompts": 4, "pictures": 1, "seed": 0, "strength": 1.0, "inversion": False, "steps": 20,
            "guidance": 5.0, "resolution": 0, "inversion_steps": 300, "inversion_vectors": 2,
        },
        "attention": {"own tokens": {"before": 0.3, "after": 0.1}, "from there on": {"before": 0.5, "after": 0.4}},
        "noise_drift": {"empty": {"mean": 0.0}}, "picture_change": None,
    },
    "warnings": ["Little effect."],
}  # fmt: skip
NEW_REPORT = {
    "erasure": {"cat": 0.9}, "synonyms": ["kitten"], "preserve_drift": {"dog": 0.1}, "empty_prompt_drift": 0.01,
    "attention_mass": {"before": 0.3, "after": 0.1, "with_unet_lora": 0.05},
    "target_error": {"before": 1.0, "fast": 0.5, "after": 0.2}, "noise_drift": 0.02, "unrelated_drift": 0.003,
    "learned_word_errors": [0.4, 0.5], "steps": 35, "strength": 1.1, "loss": [2.0, 1.0],
    "interference": [{"concept": "cat", "other": "dog", "interference": 0.2}],
    "response_errors": [{"concept": "cat", "added": 0.2, "jointly": 0.1}], "collateral_change": 0.4,
    "imported": {
        "file": "x.safetensors", "kind": "LoRA", "unet_layers": 3, "unet_error": 0.2, "rank": 4, "projections": 20,
        "error": 0.1, "worst_projection": "lora_unet_x", "worst_error": 0.3,
    },
    "evaluation": {
        "summary": "Fine.", "warnings": [], "prompt_drift": {"near": {"mean": 0.1, "each": {"dog": 0.1}}},
        "settings": {
            "preserve": "dog", "prompts": 4, "images_per_prompt": 1, "seed": 0, "strength": 1.0, "inversion": False,
            "num_inference_steps": 20, "guidance_scale": 5.0, "resolution": 0, "inversion_steps": 300,
            "inversion_vectors": 2,
        },
        "attention": {"own_tokens": {"before": 0.3, "after": 0.1}, "from_there_on": {"before": 0.5, "after": 0.4}},
        "noise_drift": {"empty": {"mean": 0.0}}, "picture_change": None,
    },
    "warnings": ["Little effect."],
}  # fmt: skip


def stored(path):
    """What a patch's file says of it, as it stands there."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fmn.patch"])


def written(folder, info, tensors=None, name="old.safetensors"):
    """The file of a patch that says this of itself, with the car's tensors or others."""
    path = folder / name
    save_file(dict(tensors or load_file(CAR)), path, {"fmn.patch": json.dumps(info)})
    return path


def old_stack(fresh, files):
    """What a stack of patches of schema 1 said of itself, as the version wrote it that stacked them: `fresh` is of the same
    files today."""
    report = fresh.info["report"]
    parts = dict(zip(sorted(file.stem for file in files), fresh.info["patches"], strict=True))
    return {
        "schema": 1,
        "version": fresh.info["version"],
        "concept": "car, cat",
        "concepts": fresh.info["concepts"],
        "settings": {"preset": "stack", "seed": 0, "keep": ""},
        "base": fresh.info["base"],
        "members": [
            {"info": stored(file), "rank": part["rank"], "strength": part["strength"], "has": part["modules"]}
            for file in files
            for part in [parts[file.stem]]
        ],
        "report": {
            "conflicts": [
                {"concept": pair["concept"], "other": pair["other"], "share": pair["interference"]}
                for pair in report["interference"]
            ],
            "responses": report["response_errors"],
            "spill": report["collateral_change"],
            "warnings": report["warnings"],
        },
    }


@pytest.fixture(scope="module")
def fresh():
    """The demo's patches, stacked today."""
    return stack([WeightedPatch(read_patch(CAR)), WeightedPatch(read_patch(CAT), 0.5)])


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


@pytest.mark.parametrize("schema", [1, SCHEMA])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "x"}, "does not say what it forgets"), ({"base": {}}, "does not say what it forgets"),
        ({"base": {"family": [], "name": "x"}}, "does not say what it forgets"),
        ({"concept": None}, "does not say what it forgets"), ({"settings": []}, "does not say what it forgets"),
        ({"report": 1}, "does not say what it forgets"), ({"version": None}, "does not say what it forgets"),
        ({"concepts": "x"}, "says of its concepts"), ({"concepts": [{"names": []}]}, "says of its concepts"),
        ({"concept": "cat\x1b[2J"}, "control characters"),
        ({"settings": {str(n): n for n in range(300)}}, "300 settings"),
        ({"settings": {"keep": "cat, " * 20_000}}, "a text of 100,000"),
        ({"report": {"also": ["w" * 70_000]}}, "a text of 70,000"),
        ({"report": {"drift": {"w" * 70_000: 1.0}}}, "a text of 70,000"),
        ({"members": [{"info": {}}] * 300}, "stacked of 300 patches"),
        ({"members": [{"info": {"settings": {"keep": "w" * 70_000}}}]}, "a text of 70,000"),
        ({"members": [{"info": {"schema": 1, "report": {"warnings": ["w" * 70_000]}}}]}, "a text of 70,000"),
    ],
)  # fmt: skip
def test_hostile_files_of_schema_1_are_refused_with_the_sentence_for_those_of_schema_2(tmp_path, schema, change, message):
    names = {} if schema == 1 else {"members": "patches"}
    change = {names.get(key, key): value for key, value in change.items()}
    with pytest.raises(ForgetError, match=message):
        read_patch(written(tmp_path, stored(CAR) | change | {"schema": schema}))


@pytest.mark.parametrize("schema", [0, 3, "1", None, [1], {"1": 1}, 1.5])
def test_other_schemas_are_refused(tmp_path, schema):
    with pytest.raises(ForgetError, match=r"is a patch of schema .*, and this version reads up to 2: update"):
        read_patch(written(tmp_path, stored(CAR) | {"schema": schema}))


@pytest.mark.parametrize(
    "members",
    [
        [], 5, None, "x", [5], [None], [{"info": "x"}],
        [{"info": {"schema": 1, "members": []}, "rank": 4, "strength": 1, "has": "1"}],
    ],
)  # fmt: skip
def test_hostile_parts_of_schema_1_get_a_sentence(tmp_path, members):
    bad = read_patch(written(tmp_path, stored(CAR) | {"members": members}))
    assert "patches" in bad.info and "members" not in bad.info
    for act in (
        lambda: stack([WeightedPatch(bad), WeightedPatch(read_patch(CAT))]),
        lambda: gate(bad, torch.zeros(77, WIDTH)),
        lambda: unstack(bad),
    ):
        with pytest.raises(ForgetError, match="damaged"):
            act()


@pytest.mark.parametrize(
    ("key", "value"),
    [("strength", float("inf")), ("strength", float("nan")), ("strength", 0), ("rank", float("inf")), ("rank", 0),
     ("rank", 5), ("has", "1"), ("has", None), ("info", None), ("info", "x")],
)  # fmt: skip
def test_parts_of_schema_1_with_impossible_figures_get_a_sentence(fresh, old, tmp_path, key, value):
    old["members"][0][key] = value
    with pytest.raises(ForgetError, match="damaged"):
        unstack(read_patch(written(tmp_path, old, fresh)))


@pytest.mark.parametrize("key", ["concept", "settings", "base", "report", "version", "schema"])
def test_parts_of_schema_1_say_of_themselves_what_every_patch_does(fresh, old, tmp_path, key):
    del old["members"][0]["info"][key]
    bad = read_patch(written(tmp_path, old, fresh))
    for act in (lambda: gate(bad, torch.zeros(77, WIDTH)), lambda: unstack(bad)):
        with pytest.raises(ForgetError, match="A part of the stacked patch"):
            act()


@pytest.mark.parametrize(
    "change", [{"tail": "x"}, {"tail": 0}, {"keys": {}}, {"keys": {"shape": [10**9, 10**9], "scale": 1, "fp16": ""}}]
)
def test_damaged_words_of_schema_1_get_a_sentence(tmp_path, change):
    info = stored(CAR)
    bad = read_patch(written(tmp_path, info | {"moments": info["moments"] | change}))
    for act in (lambda: gate(bad, torch.zeros(77, WIDTH)), lambda: stack([WeightedPatch(bad)])):
        with pytest.raises(ForgetError, match="damaged"):
            act()


NAMES = sorted({*SETTINGS, *REPORT, *NEW_REPORT, "info", "members", "has", "worst", "rest", "settings", "report", "schema"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.text(max_size=3) | st.sampled_from(["q k v", "whole"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    max_leaves=12,
)
INFO = st.fixed_dictionaries(
    {"schema": st.just(1)},
    optional={key: JSON for key in ("base", "concept", "concepts", "members", "moments", "report", "settings", "version")},
)


@settings(max_examples=200)
@given(INFO)
def test_anything_of_schema_1_is_upgraded_once_and_read_or_refused_with_a_sentence(info):
    before = repr(copy.deepcopy(info))
    new = upgraded(info)
    assert repr(info) == before and repr(upgraded(new)) == repr(new) and new["schema"] == SCHEMA
    assert not {"members", "moments"} & {*new}
    PatchReport.read(new.get("report"))
    try:
        check_info(new, "x.safetensors")
    except ForgetError as error:
        assert "x.safetensors" in str(error)


@given(JSON)
def test_what_is_not_of_schema_1_stays_as_it_is(value):
    if not (isinstance(value, dict) and value.get("schema") == 1):
        assert upgraded(value) is value
