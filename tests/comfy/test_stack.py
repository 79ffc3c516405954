"""Stacked patches: each does what it does alone, in any order, and they come apart again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from stacked import NAMES, delta, distance, few_patches, forgotten

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.evaluation.prompts import subjects_of
from fmn_core.patch.conflicts import conflict_warnings, conflicts
from fmn_core.patch.file import read_patch, save_patch, serialize
from fmn_core.patch.gate import OPEN, gate
from fmn_core.patch.patch import DOWN, UP, Patch
from fmn_core.patch.stack import OWN, stack, unstack
from fmn_core.patch.summary import summary
from fmn_core.patch.weighted import WeightedPatch, reads_text


@pytest.fixture(scope="module")
def comfy_host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def patches(comfy_host):
    return few_patches(comfy_host)


def test_a_patch_alone_comes_out_as_it_went_in(patches):
    for patch in patches:
        assert distance(stack([WeightedPatch(patch)]), patch) < 1e-3


def test_the_order_does_not_matter_and_a_patch_that_is_off_or_there_twice_neither(patches):
    weighted = [WeightedPatch(patch, 0.5 + i) for i, patch in enumerate(patches)]
    whole = serialize(stack(weighted), "s")
    assert whole == serialize(stack(weighted[::-1]), "s")
    off = WeightedPatch(forgotten(patches[0], "tiger"), 0.0)
    assert whole == serialize(stack([*weighted, off]), "s")
    assert whole == serialize(stack([*weighted, weighted[1]]), "s")


def test_strength_scales_linearly(patches):
    one = stack([WeightedPatch(patch) for patch in patches])
    half = stack([WeightedPatch(patch, -0.5) for patch in patches])
    assert all((delta(one, m) + 2 * delta(half, m)).norm() <= 2e-3 * delta(one, m).norm() for m in one.modules)


def test_it_is_the_least_squares_solution(patches):
    """Against a dense solver on the stated objective, without the formula; other projections are sums."""
    weighted = [WeightedPatch(patch, strength) for patch, strength in zip(patches, (1.0, 0.7, 1.3, 1.0), strict=True)]
    joint = stack(weighted)
    known = [each.statistics for each in weighted]
    kept = sum(own.kept.T @ own.kept + own.tail * torch.eye(112) for own in known) / len(known)
    kept = torch.linalg.cholesky(kept).T
    for module in joint.modules[:8]:
        own = [strength * delta(p, module) if module + UP in p else 0 * delta(joint, module) for p, strength in weighted]
        if not reads_text(module):
            assert torch.allclose(delta(joint, module), sum(own), atol=2e-3 * sum(own).abs().max())
            continue
        Z = torch.cat([p[module + DOWN].double() for p, _ in weighted if module + DOWN in p])
        rows, wanted = [kept], [kept @ sum(own).T]
        for statistics, change in zip(known, own, strict=True):
            rows.append(OWN**0.5 * statistics.keys)
            wanted.append(OWN**0.5 * statistics.keys @ change.T)
        T = torch.linalg.lstsq(torch.cat(rows) @ Z.T, torch.cat(wanted), driver="gelsd").solution.T
        assert (delta(joint, module) - T @ Z).norm() < 3e-3 * (T @ Z).norm()
        assert (T @ Z - sum(own)).norm() > 0.02 * (T @ Z).norm(), "where adding would do, this shows nothing"


def test_a_stack_comes_apart_again_also_from_its_file_and_within_another(patches, tmp_path):
    weighted = [WeightedPatch(patch, strength) for patch, strength in zip(patches, (1.0, 0.5, -2.0, 1.0), strict=True)]
    joint = stack(weighted)
    save_patch(joint, tmp_path / "s.safetensors")
    read = read_patch(tmp_path / "s.safetensors")
    parts = {part.name: part for part in unstack(read)}
    for patch, strength in weighted:
        part = parts[patch.info["concept"]]
        assert part.strength == strength and part.patch.info == json.loads(json.dumps(patch.info))
        assert distance(part.patch, patch) < 4e-3
    assert distance(stack(list(parts.values())), joint) < 4e-3
    nested = stack([WeightedPatch(stack(weighted[:2])), *weighted[2:]])
    assert distance(nested, joint) < 4e-3 and nested.info["concept"] == joint.info["concept"]
    halved = stack([WeightedPatch(joint, 0.5)])
    assert all((delta(joint, m) - 2 * delta(halved, m)).norm() <= 5e-3 * delta(joint, m).norm() for m in joint.modules)
    beside = stack([WeightedPatch(joint), *weighted[:2]])
    assert len(beside.info["patches"]) == 4, "there once, at the larger strength"
    with pytest.raises(ForgetError, match="not a stack of others"):
        unstack(patches[0])
    lying = Patch(dict(read), copy.deepcopy(read.info))
    lying.info["patches"][0]["rank"] += 1
    with pytest.raises(ForgetError, match="damaged"):
        unstack(lying)


def test_jointly_each_is_nearer_to_what_it_does_alone_than_simply_added(patches):
    report = stack([WeightedPatch(patch) for patch in patches[:3]]).info["report"]
    assert [one["concept"] for one in report["response_errors"]] == sorted(NAMES)
    assert all(one["jointly"] < one["added"] for one in report["response_errors"])
    shares = [pair["interference"] for pair in report["interference"]]
    assert len(shares) == 6 and shares == sorted(shares, reverse=True) and min(shares) > 0


def test_conflicts_are_what_one_patch_adds_to_the_words_of_another(patches):
    one, other = (WeightedPatch(patch) for patch in patches[:2])
    found = {pair["concept"]: pair["interference"] for pair in conflicts([one, other])}
    x = one.statistics.keys.T
    changes = [torch.cat([delta(p, m) @ x for m in p.modules]).norm().item() for p in patches[:2]]
    assert found["cat"] == pytest.approx(changes[1] / changes[0])
    assert conflicts([one, WeightedPatch(patches[1], 2.0)])[0]["interference"] == pytest.approx(2 * found["cat"])


def test_contradictions_are_told_with_what_to_do(patches):
    same = forgotten(patches[1], "cat")
    text = " ".join(
        conflict_warnings([WeightedPatch(patches[0]), WeightedPatch(same), WeightedPatch(forgotten(patches[2], "house"))])
    )
    assert "Two patches forget `cat`" in text and "`house` is kept by the patch of `cat`" in text and "Leave" in text
    joint = stack([WeightedPatch(patches[0]), WeightedPatch(forgotten(patches[2], "house"))])
    assert "house" in summary(joint) and joint.info["settings"]["preserve"] == ""


def test_a_stack_forgets_the_word_that_a_part_corrects_and_keeps_what_overshadows_it(comfy_host, patches):
    corrected, _ = forget(comfy_host, "cat, kitten", make_config(mode="correct", target="lion"))
    own, whole = subjects_of(corrected), stack([WeightedPatch(corrected), WeightedPatch(patches[2])])
    assert {*own.names} == {"lion"} and own.preserve == ("cat", "kitten")
    assert {*subjects_of(whole).names} == {"lion", "dog"} and {*subjects_of(whole).preserve} == {"cat", "kitten", "house"}
    assert conflict_warnings([WeightedPatch(corrected), WeightedPatch(patches[1])]) == [
        "Two patches forget `lion`, which is more than enough: leave one out."
    ]
    (told,) = conflict_warnings([WeightedPatch(corrected), WeightedPatch(patches[0])])
    assert told.startswith("`cat` is kept by the patch of `cat` and forgotten by that of `cat`")
    assert any(part.patch.info == corrected.info for part in unstack(whole))
    silent = Patch(dict(corrected), corrected.info | {"settings": {"mode": "correct"}})
    assert stack([WeightedPatch(silent)]).info["concepts"] == []
    with pytest.raises(ForgetError, match="does not say what it forgets"):
        subjects_of(silent)


def test_patches_without_words_are_added_and_of_other_models_refused(patches):
    mute = [Patch(dict(p), {k: v for k, v in p.info.items() if k != "statistics"}) for p in patches[:2]]
    joint = stack([WeightedPatch(patch) for patch in mute])
    assert all(torch.allclose(delta(joint, m), sum(delta(p, m) for p in mute), atol=1e-4) for m in joint.modules)
    half = stack([WeightedPatch(mute[0]), WeightedPatch(patches[1])])
    assert torch.isfinite(delta(half, half.modules[0])).all()
    wide = {key: torch.cat([value, value], 1) if key.endswith(DOWN) else value for key, value in patches[1].items()}
    for other in (
        Patch(wide, patches[1].info),
        Patch(dict(patches[1]), patches[1].info | {"base": {"family": "sdxl", "name": "XL"}}),
    ):
        with pytest.raises(ForgetError, match="were made for different models"):
            stack([WeightedPatch(patches[0]), WeightedPatch(other)])
    for nothing in ([], [WeightedPatch(patches[0], 0.0)]):
        with pytest.raises(ForgetError, match="no patch to stack"):
            stack(nothing)


def test_the_gate_opens_for_the_concept_and_stays_shut_for_its_neighbours(patches, comfy_host):
    def value(patch, prompt):
        return gate(patch, comfy_host.encode([prompt]).prompt_embeds[0])

    for patch in (patches[0], patches[3]):  # in closed form, and trained
        name = patch.info["concept"]
        own = (
            f"a {name}",
            f"a photo of a {name} on a sofa",
            f"here you see a {name}, neon style",
            f"a {name} beside a house",
        )
        others = ("a dog", "a house", "a car beside a tree", "", "a bird in the sky", "a house in neon style")
        assert {prompt: value(patch, prompt) > OPEN for prompt in own} == dict.fromkeys(own, True)
        assert {prompt: value(patch, prompt) > OPEN for prompt in others} == dict.fromkeys(others, False)
    assert value(patches[0], "a kitten") > OPEN, "another name of the same"
    together = forget(comfy_host, "cat\nrose\nhouse\ncar", make_config())[0]
    assert {name: value(together, f"a {name}") > OPEN for name in ("cat", "rose", "house", "car")} == dict.fromkeys(
        ("cat", "rose", "house", "car"), True
    )
    assert max(value(together, prompt) for prompt in ("a dog", "a fox", "", "a bird")) < OPEN
    both = stack([WeightedPatch(patches[0]), WeightedPatch(patches[2])])
    assert min(value(both, "a cat"), value(both, "a dog")) > OPEN > value(both, "a house")
    with pytest.raises(ForgetError, match="encoded to a width of 768"):
        gate(patches[0], torch.zeros(77, 768))
    with pytest.raises(ForgetError, match="does not know the words"):
        gate(Patch(dict(patches[0]), {"concept": "cat"}), torch.zeros(77, 112))


def test_nearly_the_same_patches_are_told_and_not_taken_apart_wrongly(comfy_host, patches):
    again = forget(comfy_host, "cat", make_config(preserve="house", rank=6))[0]
    joint = stack([WeightedPatch(patches[0]), WeightedPatch(again)])
    assert any("nearly the same" in line for line in joint.info["report"]["warnings"])
    with pytest.raises(ForgetError, match="nearly the same"):
        stack([WeightedPatch(joint), WeightedPatch(patches[1])])


def test_patches_that_keep_nothing_are_told_when_they_add_up(patches):
    kept = stack([WeightedPatch(patch) for patch in patches[:3]])
    assert 0 < kept.info["report"]["collateral_change"] < 0.5 and "should keep" not in summary(kept)
    dice = torch.Generator().manual_seed(0)
    careless = []
    for patch in patches[:3]:
        tensors = {k: torch.randn(v.shape, generator=dice).half() if k.endswith(DOWN) else v for k, v in patch.items()}
        careless.append(Patch(tensors, patch.info))
    joint = stack([WeightedPatch(patch) for patch in careless])
    assert joint.info["report"]["collateral_change"] > 1 and "change what they should keep" in summary(joint)
