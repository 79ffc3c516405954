"""Files changed to harm: bytes, headers, what a patch says of itself, tensors."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import torch
from safetensors.torch import load, save

from fmn_core.convert.exporter import PER_LEVEL, to_diff, to_peft
from fmn_core.lora.keys import dotted, one_name
from fmn_core.patch.file import read_patch, serialize
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch

ROOT = Path(__file__).resolve().parents[2]
TYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64", "I64", "I8", "U16", "BOOL", "X", "", 7, None]
NUMBERS = [0, 1, -1, 2, 255, 2**31, 2**62, 2**64, 10**30, 1.5, float("nan"), float("inf"), 1e308, -0.0]
PIECES = [
    "cat", "a", "🐈", "猫", "قطة", "\u202e", "\u200b", "\u0301" * 9, "\x00", "\ud800", "\uffff", "(", ")", "((", "(cat:1.2)",
    "(cat:", ":1e9)", "(:0)", "(cat:nan)", "\\(", "\\", "[", "]", "{}", "{", "}", "%s", "%concept%", "embedding:", "<", ">",
    "embedding:../../x", "<lora:x:1>", "BREAK", "AND", ",", ",,", "\n", "\r\n", "\t", " ", "_", "-", "'", '"', "/", "\\..\\",
    "../", "CON", "nul.txt", "ﬁ", "Å", "ß", "İ", "1", "0.5", "http://x", "a" * 200, "cat " * 90, "🐈" * 100, "\u2028",
    "</w>", "<|endoftext|>", "<|startoftext|>",
]  # fmt: skip


def corpus() -> list[bytes]:
    """A small whole file of each kind that the readers know, and a stacked patch."""
    whole = [read_patch(ROOT / f"demo/loras/forget-{name}.safetensors") for name in ("cat", "car")]
    small = []
    for patch in whole:
        kept = {name for name in patch.modules if "mid_block" in name}
        small.append(Patch({key: t for key, t in patch.items() if key.split(".")[0] in kept}, patch.info))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    return [
        serialize(small[0], "p"),
        serialize(small[0], "p"),
        serialize(stack([WeightedPatch(patch) for patch in small]), "both"),
        save(to_peft(small[0]), {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 2}}'}),
        save(dict(to_diff(small[0]))),
        save({f"{name}.weight": torch.ones(192, 112), f"unet.{name.replace('to_k', 'to_out.0')}.bias": torch.ones(192)}),
        save({"emb_params": torch.ones(2, 112)}),
        save({key: torch.ones(shape) for key, shape in checkpoint_of(small[0])}),
    ]


def checkpoint_of(patch: Patch) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of the weights that a patch changes, as a checkpoint of diffusers has them."""
    return [
        (f"{dotted(one_name(module, PER_LEVEL))}.weight", (len(patch[module + UP]), patch[module + DOWN].shape[1]))
        for module in patch.modules
    ]


def parts(raw: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def text(rng: random.Random, most: int = 6) -> str:
    """Any Unicode, among it what parsers stumble over."""
    pieces = (
        rng.choice(PIECES) if rng.random() < 0.7 else chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, most))
    )
    return "".join(pieces)


def junk(rng: random.Random, depth: int = 3) -> object:
    """Any JSON."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [junk(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 7:
        return {text(rng, 2): junk(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return [None, True, rng.choice(NUMBERS), rng.choice(NUMBERS), text(rng), ""][kind]


def cut_and_set(rng: random.Random, raw: bytes) -> bytes:
    changed, size = bytearray(raw), struct.unpack("<Q", raw[:8])[0]
    for _ in range(rng.randint(1, 5)):
        place = rng.randint(0, min(len(changed), size + 64)) if rng.random() < 0.7 else rng.randint(0, len(changed))
        what = rng.randbytes(rng.randint(0, 8))
        kind = rng.randrange(4)
        if kind == 0 and rng.random() < 0.3:
            del changed[place:]
        elif kind == 1:
            changed[place:place] = what
        elif kind == 2:
            del changed[place : place + len(what)]
        else:
            changed[place : place + len(what)] = what
    return bytes(changed)


def lie_in_header(rng: random.Random, raw: bytes) -> bytes:
    header, data = parts(raw)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(header))
        entry, kind = header[key], rng.randrange(7)
        if kind == 0:
            header[key] = junk(rng)
        elif kind == 1:
            named = {rng.choice(["fmn.patch", "lora_adapter_metadata", "fmn.embedding", "x"]): text(rng) for _ in range(2)}
            header["__metadata__"] = rng.choice([named, junk(rng)])
        elif kind == 2:
            header[rng.choice(["unet.", "lora_te_", "base_model.model.", "x" * 5000, "../", text(rng)]) + key] = header.pop(
                key
            )
        elif not isinstance(entry, dict) or "shape" not in entry:
            continue
        elif kind == 3:
            entry["shape"] = [rng.choice([0, 1, -1, 4, 112, 2**31, 2**62]) for _ in range(rng.randint(0, 5))]
        elif kind == 4:
            entry["dtype"] = rng.choice(TYPES)
        elif kind == 5:
            entry["data_offsets"] = [rng.choice([-1, 0, 8, len(data), 2**40, 2**64]) for _ in range(rng.randint(0, 3))]
        else:
            header[key] = header[rng.choice(sorted(header))]
    return joined(header, data)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path] + [found for key in inner for found in places(value[key], (*path, key))]


def lie_about_itself(rng: random.Random, raw: bytes) -> bytes:
    header, data = parts(raw)
    if "fmn.patch" not in (header.get("__metadata__") or {}):
        return cut_and_set(rng, raw)
    info = json.loads(header["__metadata__"]["fmn.patch"])
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([path for path in places(info) if path] or [("x",)])
        inner = info
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.25 and isinstance(inner, dict):
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = junk(rng)
    header["__metadata__"]["fmn.patch"] = json.dumps(info)
    return joined(header, data)


def other_tensors(rng: random.Random, raw: bytes) -> bytes:
    tensors, (header, _) = load(raw), parts(raw)
    for _ in range(rng.randint(1, 3)):
        key, kind = rng.choice(sorted(tensors)), rng.randrange(5)
        old = tensors[key]
        if kind == 0:
            value = rng.choice([float("nan"), float("inf"), 0.0, -1.0, 1e30, 6e4, 1e-30])
            tensors[key] = torch.full(old.shape, value).to(rng.choice([torch.float16, torch.float32, torch.float64]))
        elif kind == 1:
            types = [torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool, torch.uint16, torch.bfloat16]
            tensors[key] = torch.ones(old.shape).to(rng.choice(types))
        elif kind == 2:
            tensors[key] = torch.ones([rng.randint(0, 6) for _ in range(rng.randint(0, 5))], dtype=old.dtype)
        elif kind == 3:
            part = rng.choice([DOWN, UP, ALPHA, ".diff", ".weight", ".dora_scale", ".hada_w1_a", "_lora.up.weight"])
            tensors[rng.choice([key.split(".")[0], key.rpartition(".")[0], "x", ""]) + part] = torch.ones(2, 2)
        elif len(tensors) > 1:
            del tensors[key]
    return save(tensors, header.get("__metadata__"))


MUTATIONS = (cut_and_set, lie_in_header, lie_about_itself, lie_about_itself, other_tensors)
