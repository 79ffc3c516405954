"""Files that are damaged, edited or made to harm: the readers answer with a sentence, in little time and memory."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from file_readers import CORPUS, all_readers, joined, parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fmn_core.patch.patch import ALPHA, DOWN, UP

FUZZED = settings(
    max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "C64",
    "I64",
    "I8",
    "U64",
    "U16",
    "BOOL",
    "X",
    "",
    7,
]


@pytest.fixture(scope="module")
def readers(loaded, tmp_path_factory):
    return all_readers(loaded, tmp_path_factory.mktemp("bad"))


def test_the_corpus_is_read(readers):
    for raw in CORPUS:
        readers(raw)
    assert readers.read[:6] == [True, *readers.read[1:6]] and readers.imported[:6] == [True] * 6


@FUZZED
@given(st.sampled_from(CORPUS), st.data())
def test_bytes_cut_changed_and_put_in(readers, raw, data):
    size = struct.unpack("<Q", raw[:8])[0]
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(changed), size + 64)) | st.integers(0, len(changed)))
        what = data.draw(st.binary(max_size=8))
        kind = data.draw(st.sampled_from(["cut", "set", "put in", "take out"]))
        if kind == "cut":
            del changed[place:]
        elif kind == "set":
            changed[place : place + len(what)] = what
        elif kind == "put in":
            changed[place:place] = what
        else:
            del changed[place : place + len(what)]
    readers(bytes(changed))


@FUZZED
@given(st.sampled_from(CORPUS), st.data())
def test_headers_that_lie(readers, raw, data):
    header, tensors = parts(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(header)))
        entry = header[key]
        kind = data.draw(st.sampled_from(["shape", "dtype", "offsets", "name", "junk", "swap", "metadata", "flat"]))
        if kind == "junk":
            header[key] = data.draw(JUNK)
        elif kind == "metadata":
            header["__metadata__"] = data.draw(
                JUNK | st.dictionaries(st.sampled_from(["fmn.patch", "lora_adapter_metadata"]), st.text())
            )
        elif kind == "name":
            start = data.draw(st.text(max_size=6) | st.sampled_from(["unet.", "lora_te_", "base_model.model.", "x" * 5000]))
            header[start + key] = header.pop(key)
        elif not isinstance(entry, dict) or "shape" not in entry:
            continue
        elif kind == "shape":
            entry["shape"] = data.draw(st.lists(st.integers(-1, 8) | st.sampled_from([2**31, 2**62, 10**30]), max_size=5))
        elif kind == "flat":  # as many values, in another shape
            total = 1
            for side in entry["shape"]:
                total *= side
            entry["shape"] = data.draw(
                st.sampled_from([[total], [1, total], [total, 1], [total, 1, 1, 1], [1] * 9 + [total]])
            )
        elif kind == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(DTYPES))
        elif kind == "offsets":
            entry["data_offsets"] = data.draw(st.lists(st.integers(-1, 2**64), max_size=3))
        else:
            header[key] = header[data.draw(st.sampled_from(sorted(header)))]
    readers(joined(header, tensors))


@FUZZED
@given(st.sampled_from(CORPUS), st.data())
def test_tensors_of_any_type_shape_and_value(readers, raw, data):
    """Whole files, so that the library itself has nothing to complain of."""
    from safetensors.torch import load

    tensors, (header, _) = load(raw), parts(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["value", "type", "shape", "new", "out"]))
        if kind == "value":
            value = data.draw(st.sampled_from([float("nan"), float("inf"), 0.0, -1.0, 1e30, 6e4, 1e-30]))
            tensors[key] = torch.full(
                tensors[key].shape, value, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))
            )
        elif kind == "type":
            types = [
                torch.float8_e4m3fn,
                torch.float8_e5m2,
                torch.complex64,
                torch.int8,
                torch.bool,
                torch.uint16,
                torch.bfloat16,
            ]
            tensors[key] = torch.ones(tensors[key].shape).to(data.draw(st.sampled_from(types)))
        elif kind == "shape":
            tensors[key] = torch.ones(data.draw(st.lists(st.integers(0, 6), max_size=5)))
        elif kind == "new":
            part = data.draw(
                st.sampled_from([DOWN, UP, ALPHA, ".diff", ".weight", ".dora_scale", ".hada_w1_a", "_lora.up.weight"])
            )
            tensors[data.draw(st.sampled_from([key.split(".")[0], key.rpartition(".")[0], "x", ""])) + part] = torch.ones(
                2, 2
            )
        elif len(tensors) > 1:
            del tensors[key]
    readers(save(tensors, header.get("__metadata__")))


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@FUZZED
@given(st.data())
def test_what_a_patch_says_of_itself(readers, data):
    header, tensors = parts(CORPUS[0])
    info = json.loads(header["__metadata__"]["fmn.patch"])
    path = data.draw(st.sampled_from([path for path in places(info) if path]))
    inner = info
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(JUNK)
    else:
        del inner[path[-1]]
    header["__metadata__"]["fmn.patch"] = json.dumps(info)
    readers(joined(header, tensors))
