"""Where the script lets no picture be made, or says so under it: run by tests/webui/test_webui_script.py, once in each
flavour with its Gradio."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from modules import shared
from webui.ui.drawing import away, changed, holding, same, values

from fmn_core.errors import ForgetError
from fmn_core.hosts.webui.model import current_host
from fmn_core.patch.file import read_patch
from fmn_webui.applying import ALLOW


def for_wider_text(key, tensor):
    return torch.cat([tensor] * 2, 1) if key.endswith("to_k.lora_down.weight") else tensor


def missing(loras, way):
    """A context in which the patch `cat` cannot be had, and what has to be said of it."""
    file = loras / "cat.safetensors"
    return {
        "gone": lambda: (away(file), "There is no patch `cat`"),
        "no patch": lambda: (holding(file, b"nothing"), "There is no patch `cat`"),
        "cut off": lambda: (holding(file, file.read_bytes()[:-9]), "There is no patch `cat`"),
        "damaged": lambda: (
            holding(file, changed(file, lambda key, each: each * math.nan)),
            "copy the original again|damaged",
        ),
        "of another schema": lambda: (holding(file, changed(file, same, schema=99)), "schema 99"),
        "for another model": lambda: (holding(file, changed(file, for_wider_text)), "another shape"),
    }[way]()


@pytest.mark.parametrize("rows", [[("cat", 1.0)], [("dog", 1.0), ("cat", 0.5)]])
@pytest.mark.parametrize("way", ["gone", "no patch", "cut off", "damaged", "of another schema", "for another model"])
def test_without_a_patch_there_is_no_picture_unless_the_user_allows_it(draw, loras, monkeypatch, rows, way):
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    context, said = missing(loras, way)
    with context:
        with pytest.raises(ForgetError, match=said) as refused:
            draw("a photo of a cat", values(*rows))
        assert (refused.value.status_code, refused.value.detail) == (422, str(refused.value))
        assert vars(shared.opts)[ALLOW] is False
        monkeypatch.setitem(vars(shared.opts), ALLOW, True)
        p, _, made = draw("a photo of a cat", values(*rows))
        assert re.search(said, p.comments[0]) and p.tags == [[*row] for row in rows if row[0] == "dog"]
        assert np.array_equal(made, draw("a photo of a cat", values(*rows[:-1]))[2])
    assert draw("a photo of a cat", values(*rows))[0].comments == []


@pytest.mark.parametrize("wrong", [
    values(("Cat", 1.0)), values(("../../evil", 1.0)), values((["cat"], 1.0)), values(("cat.safetensors", 1.0)),
    values((7, 1.0)), values(("cat", math.nan)), values(("cat", math.inf)), values(("cat", 10**4000)),
    values(("cat", "much")), values(("cat", None)),
    values(("cat", 1.0), layout="spiral"), values(("cat", 1.0))[:-2], values(("cat\ud800", 1.0)),
])  # fmt: skip
def test_a_request_that_is_wrong_has_no_picture(draw, monkeypatch, wrong):
    for allowing in (False, True):
        monkeypatch.setitem(vars(shared.opts), ALLOW, allowing)
        if allowing and isinstance(wrong[1], float) and math.isfinite(wrong[1]) and wrong[0] != "cat" and len(wrong) == 13:
            continue  # a name that is none is a patch that is missing
        with pytest.raises(ForgetError) as refused:
            draw("a photo of a cat", wrong)
        assert refused.value.status_code == 422


@pytest.mark.parametrize("base, said", [
    ({"name": "another", "hash": "0" * 64}, True), ({"name": "another", "hash": ""}, False), ({"name": "another"}, False),
    ({"hash": "0" * 64}, False), ({"name": "another", "hash": None}, False),
])  # fmt: skip
@pytest.mark.parametrize("rows", [[("cat", 1.0)], [("dog", 1.0), ("cat", 0.5)]])
def test_a_patch_of_another_checkpoint_is_told_under_the_picture(draw, loras, monkeypatch, base, said, rows):
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    file = loras / "cat.safetensors"
    made = changed(file, same, base=read_patch(file).info["base"] | base)
    plain = draw("a photo of a cat", values(*rows))
    with holding(file, made):
        p, _, pictures = draw("a photo of a cat", values(*rows))
    assert plain[0].comments == [] and np.array_equal(plain[2], pictures)
    assert [("`cat` was made for another" in sentence) for sentence in p.comments] == [True] * said


@pytest.mark.skipif(find_spec("backend") is None, reason="Forge's layers alone have scales")
@pytest.mark.parametrize("added, storage, refused", [
    ("merged", torch.float8_e4m3fn, True), ("in fp16", torch.float8_e4m3fn, False), ("in fp16", torch.bfloat16, True),
    ("in fp16, with fp8 sums", torch.float8_e4m3fn, True),
])  # fmt: skip
def test_a_patch_is_refused_where_scaled_fp8_would_hide_it(draw, monkeypatch, added, storage, refused):
    """The host merges LoRAs into weights before they are scaled, unless `Diffusion in Low Bits` has it add them in fp16."""
    from backend.args import dynamic_args

    host = current_host()
    plain, patched = (draw("a photo of a cat", values(*rows))[2] for rows in ([], [("cat", 1.0)]))
    monkeypatch.setattr(host.base, "storage_dtype", storage)
    monkeypatch.setitem(dynamic_args, "online_lora", added != "merged")
    monkeypatch.setitem(dynamic_args, "ops", "fp8" if "sums" in added else None)
    assert np.array_equal(draw("a photo of a cat", values(("cat", 1.0)))[2], patched)
    scaled = next(layer for layer in host.unet.modules() if hasattr(layer, "scale_weight"))
    monkeypatch.setattr(scaled, "scale_weight", torch.ones(()))
    assert np.array_equal(draw("a photo of a cat")[2], plain)
    if not refused:
        assert np.array_equal(draw("a photo of a cat", values(("cat", 1.0)))[2], patched)
        return
    with pytest.raises(ForgetError, match="scaled fp8.*no patch would be seen.*No picture was made"):
        draw("a photo of a cat", values(("cat", 1.0)))
    monkeypatch.setitem(vars(shared.opts), ALLOW, True)
    p, _, pictures = draw("a photo of a cat", values(("cat", 1.0)))
    assert "scaled fp8" in p.comments[0] and np.array_equal(pictures, plain)


def loads_nothing(*_):
    networks.loaded_networks.clear()


def loads_another(load):
    def loads(files, *strengths):
        load(files, *strengths)
        for net in networks.loaded_networks:
            net.network_on_disk.filename = str(Path(files[0]).with_name("dog.safetensors"))

    return loads


@pytest.mark.parametrize("loads, said", [
    (lambda load: loads_nothing, "has not loaded `cat`"), (loads_another, "in the place of"),
])  # fmt: skip
def test_a_patch_that_the_host_did_not_load_ends_the_generation(draw, monkeypatch, loads, said):
    with monkeypatch.context() as patched:
        patched.setattr(networks, "load_networks", loads(networks.load_networks))
        with pytest.raises(ForgetError, match=said):
            draw("a photo of a cat", values(("cat", 1.0)))
        patched.setitem(vars(shared.opts), ALLOW, True)
        assert said in draw("a photo of a cat", values(("cat", 1.0)))[0].comments[0]
    with pytest.raises(ForgetError, match="are disabled"):
        draw("a photo of a cat", values(("cat", 1.0)), disable_extra_networks=True)
    assert draw("a photo of a cat", values(("cat", 1.0)))[0].comments == []


def test_whatever_fails_in_the_script_ends_the_generation(draw, monkeypatch):
    monkeypatch.setattr("fmn_webui.applying.find_patch", lambda name: 1 / 0)
    with pytest.raises(ForgetError, match="ZeroDivisionError"):
        draw("a photo of a cat", values(("cat", 1.0)))
    assert draw("a photo of a cat")[0].comments == []
