"""Stacked patches in files and on the command line, and parts that were made to harm."""

from __future__ import annotations

import copy

import pytest
import torch
from stacked import distance, few_patches, forgotten

from fmn_core.cli.main import main
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.gate import gate
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.statistics import TextStatistics
from fmn_core.patch.weighted import WeightedPatch


@pytest.fixture(scope="module")
def patches(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return few_patches(ComfyHost(*loaded))


def test_the_command_stacks_files_and_takes_them_apart(patches, tmp_path, capsys):
    for patch in patches[:2]:
        save_patch(patch, tmp_path / f"{patch.info['concept']}.safetensors")
    out = tmp_path / "both.safetensors"
    assert (
        main(["stack", str(tmp_path / "cat.safetensors"), f"{tmp_path / 'lion.safetensors'}=0.5", "--output", str(out)]) == 0
    )
    assert "Simply added" in capsys.readouterr().out
    assert distance(read_patch(out), stack([WeightedPatch(patches[0]), WeightedPatch(patches[1], 0.5)])) == 0
    assert main(["unstack", str(out), "--output", str(tmp_path / "parts")]) == 0
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "forget-cat.safetensors",
        "forget-lion.safetensors",
    ]
    assert "strength 0.5" in capsys.readouterr().out
    save_patch(forgotten(patches[2], "cat"), tmp_path / "other.safetensors")
    both = [str(tmp_path / name) for name in ("cat.safetensors", "other.safetensors")]
    assert main(["stack", *both, "--output", str(tmp_path / "cats.safetensors")]) == 0
    assert main(["unstack", str(tmp_path / "cats.safetensors"), "--output", str(tmp_path / "parts")]) == 0
    assert {"forget-cat-1.safetensors", "forget-cat-2.safetensors"} < {path.name for path in (tmp_path / "parts").iterdir()}
    save_patch(forgotten(patches[1], "cat 1"), tmp_path / "numbered.safetensors")
    several = [*both, str(tmp_path / "numbered.safetensors")]
    assert main(["stack", *several, "--output", str(tmp_path / "three.safetensors")]) == 0
    assert main(["unstack", str(tmp_path / "three.safetensors"), "--output", str(tmp_path / "numbered")]) == 0
    assert len([*(tmp_path / "numbered").iterdir()]) == 3
    capsys.readouterr()
    assert main(["stack", str(tmp_path / "cat.safetensors") + "=nan", "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "is not a strength" in capsys.readouterr().err
    assert main(["stack", str(tmp_path / "cat.safetensors") + "=much", "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "is not a strength" in capsys.readouterr().err


def test_what_is_outside_the_cross_attention_is_added(patches):
    one, other = (Patch(dict(patch), patch.info, {}) for patch in patches[:2])
    names = ("lora_unet_x", "lora_unet_y")
    for patch, several in ((one, names), (other, names[:1])):
        for name in several:
            patch.unet_lora |= {name + UP: torch.randn(5, 2, 1, 1).half(), name + DOWN: torch.randn(2, 3, 3, 3).half()}
            patch.unet_lora[name + ALPHA] = torch.tensor(1.0).half()
    rest = stack([WeightedPatch(one, 0.5), WeightedPatch(other, 2.0)]).unet_lora

    def whole(tensors, name):
        up, down = tensors[name + UP].double().flatten(1), tensors[name + DOWN].double().flatten(1)
        return up @ down * tensors[name + ALPHA].item() / len(down)

    assert torch.allclose(
        whole(rest, "lora_unet_x"),
        0.5 * whole(one.unet_lora, "lora_unet_x") + 2 * whole(other.unet_lora, "lora_unet_x"),
        atol=0.02,
    )
    assert torch.allclose(whole(rest, "lora_unet_y"), 0.5 * whole(one.unet_lora, "lora_unet_y"), atol=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"patches": []}, {"patches": 5}, {"patches": None}, {"patches": [5]}, {"patches": [{"info": "x"}]},
        {"patches": [{"info": {"patches": []}, "rank": 4, "strength": 1, "modules": "1"}]},
    ],
)  # fmt: skip
def test_hostile_parts_get_a_sentence(patches, change):
    bad = Patch(dict(patches[0]), patches[0].info | change)
    for act in (
        lambda: stack([WeightedPatch(bad), WeightedPatch(patches[1])]),
        lambda: gate(bad, torch.zeros(77, 112)),
        lambda: unstack(bad),
    ):
        with pytest.raises(ForgetError, match="damaged"):
            act()


@pytest.mark.parametrize("key", ["schema", "concept", "settings", "base", "report", "version"])
def test_parts_say_of_themselves_what_every_patch_does(patches, key):
    joint = stack([WeightedPatch(patches[0]), WeightedPatch(patches[1])])
    bad = Patch(dict(joint), copy.deepcopy(joint.info))
    bad.info["patches"][0]["info"] = {
        k: v for k, v in bad.info["patches"][0]["info"].items() if k not in (key, "statistics")
    }
    for act in (lambda: gate(bad, torch.zeros(77, 112)), lambda: unstack(bad)):
        with pytest.raises(ForgetError, match="A part of the stacked patch"):
            act()


def test_hostile_parts_with_impossible_figures_get_a_sentence(patches):
    joint = stack([WeightedPatch(patches[0]), WeightedPatch(patches[1])])
    for key, value in (
        ("strength", 10**400),
        ("strength", float("nan")),
        ("rank", float("inf")),
        ("rank", 0),
        ("modules", "1"),
    ):
        bad = Patch(dict(joint), copy.deepcopy(joint.info))
        bad.info["patches"][0][key] = value
        with pytest.raises(ForgetError, match="damaged"):
            unstack(bad)
    wide = Patch(
        dict(patches[0]), patches[0].info | {"statistics": TextStatistics(torch.ones(2, 9), torch.ones(2, 9), 1.0).encoded()}
    )
    with pytest.raises(ForgetError, match="another width"):
        stack([WeightedPatch(wide), WeightedPatch(patches[1])])
