"""What a patch is, said and drawn: from its file alone, and beside a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from presets import config_for
from safetensors import safe_open
from safetensors.torch import save_file

from fmn_core.cli.main import main
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.inspection.describe import LETTERS, layer_label, text_of
from fmn_core.inspection.inspect import Change, delta_norm, inspect_patch
from fmn_core.inspection.plot import axis_ticks, draw_inspection
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch

CAT = ROOT / "demo/loras/forget-cat.safetensors"
QUICK = {"num_images": 2, "num_inference_steps": 2, "steps": 2, "attack_rounds": 1, "seed": 7}
PRESETS = ("fast", "paper", "balanced", "robust")


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """made(preset) -> the file of a patch by this preset that forgets two concepts, made once."""
    from fmn_core.hosts.comfy.model import ComfyHost

    folder = tmp_path_factory.mktemp("patches")

    def made(preset):
        path = folder / f"{preset}.safetensors"
        if not path.exists():
            settings = config_for(preset, rank=3, **QUICK)
            settings = replace(settings, preserve="dog\nhouse") if preset == "fast" else settings
            with pytest.MonkeyPatch.context() as change:
                change.setattr("fmn_core.erasure.adversarial.LEARNED_STEPS", 2)
                save_patch(forget(ComfyHost(*loaded), "cat, kitten\nrose", settings)[0], path)
        return path

    return made


def with_info(patch, **change):
    return Patch(dict(patch), patch.info | change)


def foreign(patch, **change):
    """The patch with no more in it than a file must have to be read."""
    needed = {key: patch.info[key] for key in ("schema", "concept", "base")}
    return Patch(dict(patch), needed | {"settings": {"preset": "imported"}} | change)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_the_norm_is_that_of_the_dense_product(rank, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    assert delta_norm(up, down) == pytest.approx((up.double() @ down.double()).norm().item(), rel=1e-9, abs=1e-12)


def test_changes_are_those_of_the_applied_patch_in_the_order_of_the_layers(comfy, host, made, loaded):
    """Against what the host's own LoRA loader adds to the weights."""
    from fmn_core.hosts.comfy.apply import apply_patch

    changes = inspect_patch(read_patch(made("robust")), host).changes
    by_name = {change.module: change for change in changes}
    patched = apply_patch(loaded[0], read_patch(made("robust")), 1.0)
    for layer in host.cross_attentions():
        for matrix in ("to_q", "to_k", "to_v", "to_out"):
            key = f"diffusion_model.{layer}.{matrix}{'.0' if matrix == 'to_out' else ''}.weight"
            weight = host.weight(layer, matrix).float()
            delta = (comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key) - weight).norm()
            change = by_name[host.lora_key(layer, matrix)]
            assert change.norm == pytest.approx(delta.item(), rel=1e-3, abs=1e-5)
            assert change.relative == pytest.approx((delta / weight.norm()).item(), rel=1e-3, abs=1e-6)
    assert list(dict.fromkeys(change.module.rsplit("_attn2_", 1)[0] for change in changes)) == [
        host.lora_key(layer, "to_k").rsplit("_attn2_", 1)[0] for layer in host.cross_attentions()
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_text_says_each_fact(made, preset):
    path = made(preset)
    patch = read_patch(path)
    inspection = inspect_patch(patch, file=path)
    text = text_of(inspection)
    facts = [
        f"{preset}.safetensors forgets cat, rose.", "`cat` also as `kitten`.", f"made by the preset {preset} of",
        f"Forget-Me-Not {patch.info['version']}, mode remove,", "made for EmojiSD (sd1)",
        f"Rank {patch.rank}, {len(patch.modules)} projections", f"{path.stat().st_size:,} bytes", "rank 3", "type object",
    ]  # fmt: skip
    facts += ["preserve dog, house"] if preset == "fast" else ["seed 7", "num_images 2", "num_inference_steps 2", "steps 2"]
    report = patch.info["report"]
    facts += [f"`rose` goes {report['erasure']['rose']:.0%}"] if preset != "paper" else []
    facts += [f"{report['attention_mass'][when]:.4f} {when}" for when in ("before", "after") if preset != "fast"]
    for fact in [*facts, *report["warnings"]]:
        assert fact in text, fact
    with safe_open(path, "pt") as file:
        assert file.metadata()["sshs_model_hash"] in text
    assert "learning_rate" not in text and "this model" not in text.lower()
    assert text.count("%)") == 0, "there is no |W| without a model"
    lines = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("down", "mid", "up")))
    for change in inspection.changes:
        figures = lines[layer_label(change, inspection.changes)].split(", ")
        assert f"{LETTERS[change.matrix]} {change.norm:.3g}" in figures


def test_the_near_word_that_moves_most_is_named_though_files_sort_their_words():
    drift = read_patch(CAT).info["report"]["preserve_drift"]
    assert [*drift] == sorted(drift), "the test has no point"
    text = text_of(inspect_patch(read_patch(CAT)))
    assert f"`{max(drift, key=drift.get)}` moves most, by {max(drift.values()):.1%}" in text


def test_it_says_whether_a_model_is_the_patchs_own(host, made, xl_pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    patch = read_patch(made("fast"))
    own = inspect_patch(patch, host)
    assert own.fit.fits and own.fit.same and "Made for this very model, EmojiSD." in text_of(own) and not own.warnings
    other = inspect_patch(with_info(patch, base=patch.info["base"] | {"hash": "0" * 64}), host)
    assert other.fit.fits and not other.fit.same and "made on other weights of the same architecture" in text_of(other)
    silent = inspect_patch(with_info(patch, base={"name": "EmojiSD", "family": "sd1"}), host)
    assert silent.fit.fits and not silent.fit.same and "does not say on which weights" in text_of(silent)
    wrong = inspect_patch(patch, DiffusersHost(xl_pipeline, progress_bar=False))
    assert not wrong.fit.fits and "Does not fit the model" in text_of(wrong) and "load the checkpoint" in wrong.warnings[0]
    assert [change.norm for change in wrong.changes] == [change.norm for change in own.changes]
    assert all(change.relative is None for change in wrong.changes)


def test_changed_weights_are_another_model(host, made, monkeypatch):
    patch = read_patch(made("fast"))
    (layer, *_), weight = host.cross_attentions(), type(host).weight
    monkeypatch.setattr(type(host), "weight", lambda self, *where: weight(self, *where) + (where == (layer, "to_v")))
    assert not inspect_patch(patch, host).fit.same


@pytest.mark.parametrize("preset", PRESETS)
def test_the_picture_shows_bars_and_words(made, preset, host):
    inspection = inspect_patch(read_patch(made(preset)), host, made(preset))
    picture = draw_inspection(inspection)
    assert picture.shape[1:] == (1024, 3) and 400 < len(picture) < 1500 and 0 <= picture.min() and picture.max() == 1
    colours = (picture * 255).round().reshape(-1, 3).int().unique(dim=0).tolist()
    bars = {"K": [36, 113, 163], "V": [214, 137, 16], "out": [125, 60, 152]}
    assert [letter for letter, colour in bars.items() if colour in colours] == [*bars][: 3 if preset == "robust" else 2]
    assert (picture[:, -20:] == 1).all() and (picture[-20:] == 1).all(), "something runs out of the picture"
    unwarned = replace(inspection, report=inspection.report.updated(warnings=[]))
    warned = replace(inspection, report=inspection.report.updated(warnings=["Little effect."]))
    red = [draw_inspection(each).eq(torch.tensor([192, 57, 43]) / 255).all(-1)[:120].any() for each in (unwarned, warned)]
    assert red == [False, True]


def test_a_stack_names_its_parts_and_what_they_do_to_one_another(host):
    patches = [forget(host, name, make_config())[0] for name in ("cat", "lion")]
    inspection = inspect_patch(stack([WeightedPatch(patches[0]), WeightedPatch(patches[1], 0.5)]), host)
    text = text_of(inspection)
    assert "stacked by Forget-Me-Not" in text and "2 patches: cat; lion at strength 0.5" in text and "Simply added" in text
    assert draw_inspection(inspection).shape[1] == 1024
    assert "fp16" not in json.dumps(inspection.plain()) and len(inspection.plain()["patches"]) == 2
    hostile = Patch(
        dict(patches[0]), patches[0].info | {"patches": 5, "report": {"interference": 3, "response_errors": [3, {}]}}
    )
    assert "patches that it does not name" in text_of(inspect_patch(hostile))


@given(st.floats(1e-6, 1e4))
def test_the_scale_reaches_the_highest_bar_in_a_few_round_steps(highest):
    found = axis_ticks(highest)
    assert found[0] == 0 and found[-2] < highest <= found[-1] * (1 + 1e-6) and 4 <= len(found) <= 6
    assert f"{found[1]:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


@pytest.mark.parametrize(
    "report",
    [
        None, "x", [], {"erasure": "x", "preserve_drift": 3}, {"warnings": "x", "preserve_drift": {"dog": 0.1}},
        {"erasure": {"cat": 0.5}},
        {"erasure": {"cat": float("nan"), "x": True}}, {"preserve_drift": {"x": 10**400, "y": float("inf")}},
        {"target_error": {"after": 0.2}}, {"attention_mass": {"after": 1}},
        {"attention_mass": {"before": 0, "after": 0}}, {"evaluation": {"summary": "Fine.", "prompt_drift": {"near": 3}}},
        {"evaluation": 3, "warnings": [3, "Broken."]}, {"loss": [1, 2], "noise_drift": 0.1, "steps": 3, "strength": 1.0},
        {"unrelated_drift": "x"}, {"unrelated_drift": float("nan")},
    ],
)  # fmt: skip
def test_what_a_foreign_patch_lacks_is_left_out(made, report):
    patch = read_patch(made("fast"))
    for concepts in (None, [], "x", [3, {"names": []}, {"names": "x"}, {"names": ["cat", "puss"]}]):
        inspection = inspect_patch(foreign(patch, report=report, concepts=concepts))
        text = text_of(inspection)
        assert "This patch forgets cat, rose." in text and "It is imported: made by no preset" in text
        assert draw_inspection(inspection).shape[1] == 1024
        json.dumps(inspection.plain())
    assert "`cat` also as `puss`." in text
    for said in ("Broken.", "Fine.", "`dog` 10.0%", "`cat` goes 50%"):
        known = {"Broken.": "Broken", "Fine.": "Fine", "`dog` 10.0%": "'dog'", "`cat` goes 50%": "'cat': 0.5"}[said]
        assert (said in text) == (known in str(report))


@pytest.mark.parametrize("preset", [None, ["fast"], {}, 3, "made up"])
def test_a_preset_that_is_none_of_ours_shows_its_settings(made, preset):
    settings = {"preset": preset, "mode": ["x"], "source": "elsewhere"}
    text = text_of(inspect_patch(foreign(read_patch(made("fast")), settings=settings)))
    assert "Settings: source elsewhere." in text and "made by the preset" not in text


def test_a_patch_of_sdxl_is_told_block_by_block(made):
    """sgm's names, several layers deep; the norm grows with the layer's place in the forward order."""
    blocks = ["input_blocks_4_1", "input_blocks_10_1", "middle_block_1", "output_blocks_0_1", "output_blocks_11_1"]
    names = [f"lora_unet_{block}_transformer_blocks_{depth}_attn2_to_k" for block in blocks for depth in (0, 1, 10)]
    tensors = {}
    for number, name in enumerate(names):
        tensors[name + UP], tensors[name + DOWN] = torch.full((2, 1), number + 1.0).half(), torch.ones(1, 2).half()
        tensors[name + ALPHA] = torch.tensor(1.0).half()
    patch = Patch(dict(sorted(tensors.items())), read_patch(made("fast")).info | {"base": {"name": "XL", "family": "sdxl"}})
    inspection = inspect_patch(patch)
    assert [change.module for change in inspection.changes] == names
    assert [change.norm for change in inspection.changes] == pytest.approx([2 * (i + 1) for i in range(len(names))])
    labels = [layer_label(change, inspection.changes) for change in inspection.changes]
    assert labels[:4] == ["down 4.1.0", "down 4.1.1", "down 4.1.10", "down 10.1.0"] and labels[7] == "mid 1"
    assert "Most in up 11.1.10, K: 30" in text_of(inspection) and len(draw_inspection(inspection)) > 300


def test_names_that_no_host_gives_stand_last(made):
    patch = read_patch(made("fast"))
    odd = {key.replace("mid_block", "strange"): tensor for key, tensor in patch.items()}
    changes = inspect_patch(Patch(odd, patch.info)).changes
    assert [change.unet_block for change in changes[-2:]] == ["other"] * 2 and len(changes) == len(patch.modules)
    assert isinstance(changes[0], Change) and changes[0].unet_block == "down"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "replace", "target": "dog"}, "forgets cat, rose; dog stands in its place."),
        (
            {"mode": "correct", "target": "tiger"},
            "lets the other meaning of tiger through, which cat, rose overshadows.",
        ),
    ],
)
def test_the_mode_is_said(made, settings, said):
    patch = read_patch(made("fast"))
    patch = with_info(patch, settings=patch.info["settings"] | settings)
    assert f"This patch {said}" in text_of(inspect_patch(patch))


def test_the_command_line_says_draws_and_refuses(capsys, model, made, tmp_path):
    def run(*words):
        capsys.readouterr()
        return main([*map(str, words)]), *capsys.readouterr()

    picture, path = tmp_path / "p.png", made("fast")
    code, said, _ = run("inspect", path, "--model", model, "--device", "cpu", "--picture", picture)
    assert code == 0 and "Made for this very model, StableDiffusionPipeline." in said and "%)" in said
    from PIL import Image

    assert Image.open(picture).width == 1024
    found = json.loads(run("inspect", path, "--json")[1])
    assert found["file"]["bytes"] == path.stat().st_size and found["settings"]["rank"] == 3 and found["model"] is None
    assert found["change"].keys() == {*read_patch(path).modules} and "statistics" not in found
    assert "never overwritten" in run("inspect", path, "--picture", picture)[2]
    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "plain.safetensors")
    code, _, refused = run("inspect", tmp_path / "plain.safetensors")
    assert code == 1 and "plain.safetensors is not a forget patch: use the host's Load LoRA" in refused
