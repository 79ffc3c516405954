"""Files of schema 1 that are damaged or were made to harm."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_1 import CAR, CAT, NEW_REPORT, REPORT, SETTINGS, WIDTH, new_stack, old_stack, stored, written

from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch
from fmn_core.patch.gate import gate
from fmn_core.patch.report import PatchReport
from fmn_core.patch.schema import SCHEMA, check_info, upgraded
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.weighted import WeightedPatch


@pytest.fixture(scope="module")
def fresh():
    return new_stack()


@pytest.fixture
def old(fresh):
    """What their stack said of itself in schema 1."""
    return old_stack(fresh, [CAR, CAT])


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
