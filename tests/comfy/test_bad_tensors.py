"""Patches of wrong tensors and of nonsense about themselves: a sentence from every reader."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from file_readers import CORPUS, all_readers, joined, parts, small_patch
from safetensors.torch import save

from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch


@pytest.fixture(scope="module")
def readers(loaded, tmp_path_factory):
    return all_readers(loaded, tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        b"PK\x03\x04 a zip, as .ckpt files are",
        b"\x80\x02}q\x00. a pickle",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        joined(b"{" * 200_000, b""),
        joined(b'{"a":' * 100_000, b""),
        joined(b"\xff" * 100, b""),
        joined({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        joined({"__metadata__": {"fmn.patch": "[" * 1_000_000}}, b""),
        joined({"__metadata__": {"lora_adapter_metadata": "9" * 1_000_000}}, b""),
        joined({f"lora_unet_{'_' * 500_000}attn2.alpha": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, b"\0\0"),
        joined({f"{'unet.' * 100_000}x.alpha": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, b"\0\0"),
        joined({f"input_blocks.{'9' * 100_000}.1.a.alpha": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, b"\0\0"),
    ],
    ids=lambda raw: repr(raw[8:20]),
)  # fmt: skip
def test_files_that_are_something_else(readers, raw):
    readers(raw)
    assert readers.read[-1] is not True and readers.imported[-1] is not True


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "I8", "U64", "BOOL"])
@pytest.mark.parametrize("part", [UP, DOWN, ALPHA, ".diff", ".weight"])
def test_types_that_weights_do_not_have(readers, dtype, part):
    header, tensors = parts(CORPUS[0])
    key = next(key for key in header if key.endswith(DOWN if part in (".diff", ".weight") else part))
    entry = header.pop(key)
    start, end = entry["data_offsets"]
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "U64": 64}.get(dtype, 8)
    changed = {"dtype": dtype, "shape": [(end - start) * 8 // bits], "data_offsets": [start, end]}
    readers(joined({**header, key.replace(DOWN, part): changed}, tensors))
    assert readers.read[-1] is not True


@pytest.mark.parametrize(
    ("place", "value"),
    [(("base", "family"), []), (("base", "family"), {}), (("report",), 1), (("version",), None), (("schema",), "1")],
)
def test_a_patch_that_says_nonsense_of_itself(readers, place, value):
    header, tensors = parts(CORPUS[0])
    info = json.loads(header["__metadata__"]["fmn.patch"])
    inner = info[place[0]] if len(place) == 2 else info
    inner[place[-1]] = value
    header["__metadata__"]["fmn.patch"] = json.dumps(info)
    readers(joined(header, tensors))
    assert readers.read[-1] is not True


def test_a_patch_whose_first_factor_is_a_number(readers):
    patch = small_patch()
    broken = Patch({**patch, patch.modules[0] + DOWN: torch.ones((), dtype=torch.float16)}, patch.info)
    readers(save(dict(broken), {"fmn.patch": json.dumps(patch.info)}))
    assert "wrong shape" in readers.read[-1]


@pytest.mark.parametrize("name", ["x{}", "lora_te_text_model_{}.alpha", "lora_unet_down_blocks_{}_attentions_0.alpha"])
def test_tens_of_thousands_of_tensors(readers, name):
    header = {name.format(n): {"dtype": "F16", "shape": [], "data_offsets": [2 * n, 2 * n + 2]} for n in range(30_000)}
    readers(joined(header, b"\0" * 60_000))
    assert len(readers.imported[-1]) < 2000
