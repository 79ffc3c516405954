"""Files that are damaged, edited or made to harm: the readers answer with a sentence, in little time and memory."""

from __future__ import annotations

import json
import resource
import struct
import time

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fmn_core.convert.config import ImportConfig
from fmn_core.convert.exporter import merge, to_diff, to_peft
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch, serialize
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch

SLOW = 5.0  # seconds of computing for the answers to one file
MUCH = 400 << 20  # bytes of memory: no file here is larger than a few of its MB
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


def small_patch():
    whole = read_patch(ROOT / "demo/loras/forget-cat.safetensors")
    kept = {name for name in whole.modules if "mid_block" in name}
    return Patch({key: tensor for key, tensor in whole.items() if key.split(".")[0] in kept}, whole.info)


LYCORIS = {
    "hada_w1_a": (192, 2), "hada_w1_b": (2, 112), "hada_w2_a": (192, 2), "hada_w2_b": (2, 112), "lokr_w1": (4, 4),
    "lokr_w2_a": (48, 2), "lokr_w2_b": (2, 28),
}  # fmt: skip


def corpus():
    """One small file of each kind that the readers know."""
    patch = small_patch()
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    return [
        serialize(patch, "p"),
        save(to_peft(patch), {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 2}}'}),
        save(dict(to_diff(patch))),
        save({f"{name}.weight": torch.ones(192, 112), f"unet.{name.replace('to_k', 'to_out.0')}.bias": torch.ones(192)}),
        save({f"{name}.{part}": torch.ones(shape) for part, shape in LYCORIS.items()}),
        save(dict(patch) | {f"lora_te_text_model_{part}": torch.ones(2) for part in ("a.alpha", "b.alpha")}),
    ]  # fmt: skip


CORPUS = corpus()


@pytest.fixture(scope="module")
def readers(loaded, tmp_path_factory):
    """readers(data) has every reader look at the bytes, and fails for any other exception than theirs."""
    from fmn_core.hosts.comfy.model import ComfyHost

    host, path = ComfyHost(*loaded), tmp_path_factory.mktemp("bad") / "bad.safetensors"
    read, imported = [], []
    good = small_patch()

    def readers(data: bytes) -> None:
        path.write_bytes(data)
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for reader, answers in (
            (lambda: read_patch(path), read),
            (lambda: import_patch(host, path, ImportConfig(energy=0.9)), imported),
            (lambda: merge(path, good, 1.0, path.with_name("out.safetensors")).unlink(), []),
        ):
            try:
                answers.append(reader() is not None)
            except ForgetError as error:
                answers.append(str(error))
                assert "bad.safetensors" in str(error) or "bad " in str(error) or "changes nothing" in str(error), error
        assert not path.with_name("out.safetensors").exists()
        assert time.process_time() - start < SLOW
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MUCH

    readers.read, readers.imported = read, imported
    return readers


def parts(raw):
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


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
