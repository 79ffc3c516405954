"""Stack Forget Patches and Gate Forget Patch in a real server, by their pictures."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from demo.classifier import Classifier
from demo.run import load_pictures
from demo.server import ServerError
from fmn_core.patch.file import read_patch
from fmn_core.patch.stack import stack, unstack
from fmn_core.patch.weighted import WeightedPatch

FILES = ("forget-cat", "forget-car")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


@pytest.fixture(scope="module")
def loras(server):
    """Names in the server's lists: two patches, and an ordinary LoRA that makes one of them without saying so."""
    folder = server.output / "loras/stacking"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / f"{name}.safetensors").write_bytes((ROOT / f"demo/loras/{name}.safetensors").read_bytes())
    save_file(load_file(ROOT / "demo/loras/forget-car.safetensors"), folder / "ordinary.safetensors")
    return {name: f"stacking/{name}.safetensors" for name in (*FILES, "ordinary")}


@pytest.fixture(scope="module")
def draw(server):
    """draw(model, prompt, nodes) -> pictures [B, H, W, 3] that the model of a link makes of a prompt; positive: in its place
    the conditioning of a link."""

    def draw(model, prompt, nodes, positive=("p", 0)):
        workflow = {
            "c": node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors"),
            "p": node("CLIPTextEncode", clip=["c", 1], text=prompt),
            "n": node("CLIPTextEncode", clip=["c", 1], text=""),
            "l": node("EmptyLatentImage", width=128, height=128, batch_size=2),
            "k": node("KSampler", model=list(model), positive=list(positive), negative=["n", 0], latent_image=["l", 0],
                      seed=5, steps=10, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=1.0),
            "d": node("VAEDecode", samples=["k", 0], vae=["c", 2]),
            "i": node("PreviewImage", images=["d", 0]),
            **nodes,
        }  # fmt: skip
        outputs = server.run(workflow)
        return load_pictures(server, outputs["i"]["images"]), outputs

    return draw


def rows(**chosen):
    """The node's widgets, all rows empty but for those given."""
    found = {}
    for row in range(1, 7):
        found |= {f"patch_{row}": "from the lora input", f"strength_{row}": 1.0, f"enabled_{row}": True}
    return found | chosen


def test_rows_are_solved_jointly_applied_and_saved_as_one(draw, loras, server):
    chosen = rows(patch_1=loras["forget-cat"], patch_4=loras["forget-car"], strength_4=0.8)
    nodes = {
        "s": node("FMN_StackPatches", model=["c", 0], clip=["c", 1], **chosen),
        "f": node("FMN_SavePatch", lora=["s", 2], filename_prefix="stacking/both"),
        "t": node("PreviewAny", source=["s", 4]),
    }
    cats, outputs = draw(["s", 0], "an emoji of a cat", nodes)
    cars, _ = draw(["s", 0], "an emoji of a car", nodes)
    dogs, _ = draw(["s", 0], "an emoji of a dog", nodes)
    classifier = Classifier.load()
    assert [classifier.accuracy(made, name) for made, name in ((cats, "cat"), (cars, "car"), (dogs, "dog"))] == [0, 0, 1]
    assert outputs["t"]["text"][0].startswith("2 patches: car, cat\n") and "jointly" in outputs["s"]["text"][0]
    saved = re.search(r"stacking/(both_\d+_\.safetensors)", outputs["f"]["text"][0])[1]
    joint = read_patch(server.output / "loras/stacking" / saved)
    weighted = [
        WeightedPatch(read_patch(ROOT / f"demo/loras/{name}.safetensors"), s)
        for name, s in zip(FILES, (1.0, 0.8), strict=True)
    ]
    own = stack(weighted)
    assert all(torch.equal(joint[key], own[key]) for key in own)
    assert {part.name: part.strength for part in unstack(joint)} == {"cat": 1.0, "car": 0.8}
    stock = {"s": node("LoraLoader", model=["c", 0], clip=["c", 1], lora_name=f"stacking/{saved}", strength_model=1.0,
                       strength_clip=1.0)}  # fmt: skip
    assert torch.equal(draw(["s", 0], "an emoji of a cat", stock)[0], cats)


def test_rows_that_are_off_are_not_there(draw, loras):
    off = rows(patch_1=loras["forget-cat"], enabled_1=False, patch_2=loras["forget-car"], strength_2=0.0)
    nodes = {"s": node("FMN_StackPatches", model=["c", 0], clip=["c", 1], **off)}
    made, outputs = draw(["s", 0], "an emoji of a cat", nodes)
    assert torch.equal(made, draw(["c", 0], "an emoji of a cat", {})[0])
    assert outputs["s"]["text"][0] == "No forget patch is on."


def test_a_list_of_other_loras_is_applied_as_always_and_handed_on(draw, loras):
    """The list of one node goes through another; an ordinary LoRA in it is left alone by the solver."""
    listed = {"__value__": [[loras["ordinary"], "0.7", 0.5], None, ["None", 1.0, 1.0]]}
    nodes = {
        "a": node("FMN_StackPatches", lora_stack=listed, **rows()),
        "s": node(
            "FMN_StackPatches", model=["c", 0], clip=["c", 1], lora_stack=["a", 3], **rows(patch_1=loras["forget-cat"])
        ),
        "t": node("PreviewAny", source=["s", 3]),
    }
    made, outputs = draw(["s", 0], "an emoji of a car", nodes)
    assert loras["ordinary"] in outputs["t"]["text"][0] and loras["forget-cat"] in outputs["t"]["text"][0]
    assert outputs["s"]["text"][0].startswith("1 patch: cat")
    loader = {"lora_name": loras["ordinary"], "strength_model": 0.7, "strength_clip": 0.5}
    by_hand = {
        "o": node("LoraLoader", model=["c", 0], clip=["c", 1], **loader),
        "s": node("FMN_ApplyPatch", model=["o", 0], clip=["o", 1], patch=loras["forget-cat"], strength=1.0),
    }
    assert torch.equal(made, draw(["s", 0], "an emoji of a car", by_hand)[0])


def test_what_cannot_be_stacked_gets_a_sentence(draw, loras):
    for chosen, message in (
        (rows(lora_stack={"__value__": [["cat", "much", 1.0]]}), "is not a list of"),
        (rows(patch_1=loras["ordinary"]), "is not a forget patch"),
        (rows(lora_stack={"__value__": [["nowhere.safetensors", 1.0, 1.0]]}), "not in any of the host's folders"),
    ):
        with pytest.raises(ServerError, match=message):
            draw(["s", 0], "a cat", {"s": node("FMN_StackPatches", model=["c", 0], clip=["c", 1], **chosen)})


def gated(patch, **how):
    defaults = {"strength": 1.0, "end_strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "threshold": 0.6}
    return {"g": node("FMN_GatePatch", conditioning=["p", 0], patch=patch, **(defaults | how))}


def test_a_gated_patch_leaves_other_prompts_bit_for_bit_and_forgets_at_its_own(draw, loras):
    for prompt in ("an emoji of a dog", "an emoji of a house", ""):
        made, outputs = draw(["c", 0], prompt, gated(loras["forget-cat"]), ("g", 0))
        assert torch.equal(made, draw(["c", 0], prompt, {})[0]), prompt
        assert "stays off" in outputs["g"]["text"][0]
    made, outputs = draw(["c", 0], "an emoji of a cat", gated(loras["forget-cat"]), ("g", 0))
    assert Classifier.load().accuracy(made, "cat") == 0 and "acts" in outputs["g"]["text"][0]
    nodes = {"a": node("FMN_ApplyPatch", model=["c", 0], clip=["c", 1], patch=loras["forget-cat"], strength=1.0)}
    applied, _ = draw(["a", 0], "an emoji of a cat", nodes)
    assert (made - applied).abs().mean() < 0.01, "the empty negative prompt is all that is left alone beside"


def test_a_gated_patch_acts_in_its_part_of_the_sampling(draw, loras):
    base, _ = draw(["c", 0], "an emoji of a cat", {})
    whole, _ = draw(["c", 0], "an emoji of a cat", gated(loras["forget-cat"]), ("g", 0))
    change = []
    for how in (
        {"strength": 0.0, "end_strength": 0.0},
        {"start_percent": 0.99},
        {"start_percent": 0.5},
        {"end_strength": 0.0},
    ):
        made, _ = draw(["c", 0], "an emoji of a cat", gated(loras["forget-cat"], **how), ("g", 0))
        change.append((made - base).abs().mean().item())
    assert change[0] == 0 and change[0] <= change[1] < change[2] < (whole - base).abs().mean()
    assert change[3] > change[2], "what the picture will show is decided early"
    with pytest.raises(ServerError, match="swap the two"):
        draw(["c", 0], "a cat", gated(loras["forget-cat"], start_percent=0.6, end_percent=0.5), ("g", 0))
