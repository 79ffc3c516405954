"""Small files that would take much: of every kind that is known to have harmed a reader, the largest that is inside the
bounds, and random ones."""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save

from fmn_core.files import bounded_json, header
from fmn_core.patch import bounds as patch_bounds
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch
from fmn_core.patch.statistics import MOST_ROWS
from fmn_core.text import bounds as text_bounds

ROOT = Path(__file__).parent.parent
K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
Files = dict[str, bytes]


def joined(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict | None = None) -> bytes:
    """A safetensors file of tensors, name -> (type, shape, bytes)."""
    entries, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    entries |= {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values())


def lora(shapes: dict[str, tuple[int, int, int]]) -> dict[str, tuple[str, list[int], bytes]]:
    """Zeros as the tensors of a patch, module -> (out, in, rank)."""
    tensors = {}
    for name, (out, inner, rank) in shapes.items():
        tensors[name + DOWN] = "F16", [rank, inner], bytes(2 * rank * inner)
        tensors[name + UP] = "F16", [out, rank], bytes(2 * rank * out)
        tensors[name + ALPHA] = "F16", [], struct.pack("<e", min(rank, 65504))
    return tensors


def statistics(rows: int, columns: int = 1) -> dict:
    keys = {"shape": [rows, columns], "scale": 1.0, "fp16": base64.b64encode(b"\0\x3c" * rows * columns).decode()}
    return {"keys": keys, "kept": keys, "tail": 1.0}


class Maker:
    """Makes the files of each kind; `rng` decides what is left open."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.info = read_patch(ROOT / "demo/loras/forget-cat.safetensors").info | {"statistics": statistics(4)}

    def patch(self, info: dict | str | None = None, shapes: dict | None = None, **changed) -> Files:
        """A patch of one layer of 1 x 1, or of these, with something else in what it says of itself."""
        said = info if isinstance(info, str) else json.dumps({**(info or self.info), **changed})
        return {"bad.safetensors": joined(lora(shapes or {K: (1, 1, 1)}), {"fmn.patch": said})}

    def size(self, least: float, most: float) -> int:
        """A number between these, small ones as likely as large ones."""
        return round(least * (most / least) ** self.rng.random())

    def known(self) -> Iterator[tuple[str, Files]]:
        """(kind, files) of all that has harmed, at its size, and of the largest that the bounds let in."""
        yield "rank", self.patch(shapes={K: (1, 1, 32768)})
        yield "rank", self.patch(shapes=self.layers(patch_bounds.MOST_MODULES, patch_bounds.MOST_RANK))
        yield "sides", self.patch(shapes={K: (65000, 65000, 1)})
        yield "sides", self.patch(shapes=self.layers(8, 1, patch_bounds.MOST_SIDE))
        yield "statistics", self.patch(statistics=statistics(30_000))
        yield "statistics", self.patch(statistics=statistics(4_000))
        yield "statistics", self.patch(statistics=statistics(MOST_ROWS, patch_bounds.MOST_SIDE))
        yield "concepts", self.patch(concepts=self.info["concepts"] * 100_000)
        yield "concepts", self.patch(concepts=self.concepts(text_bounds.MOST_CONCEPTS, 100), statistics=statistics(64))
        yield "parts", self.patch(self.stacked(50_000))
        yield "parts", self.patch(self.stacked(patch_bounds.MOST_PARTS), {K: (1, 1, patch_bounds.MOST_PARTS)})
        yield "modules", self.patch(shapes=self.layers(20_000, 1))
        yield "modules", self.patch(shapes=self.layers(patch_bounds.MOST_MODULES, 1))
        yield "modules", {"bad.safetensors": joined({f"x{n}": ("F16", [], b"\0\0") for n in range(header.MOST_TENSORS)})}
        yield "modules", {"bad.safetensors": joined({f"lora_te_{n}.alpha": ("F16", [], b"\0\0") for n in range(200_000)})}
        yield "keys", {"bad.safetensors": self.many_keys(4_500_000)}
        yield "keys", self.patch(settings={str(n): n for n in range(bounded_json.MOST_VALUES // 2)})
        yield "keys", self.patch(settings={str(n): n for n in range(text_bounds.MOST_SETTINGS)})
        yield "keys", self.patch(report={"preserve_drift": {str(n): 0.5 for n in range(bounded_json.MOST_VALUES // 2)}})
        yield "values", self.patch(f"[{'[],' * 20_000_000}[]]")
        yield "values", self.patch(json.dumps(self.info)[:-1] + f', "x": [{"{}," * (bounded_json.MOST_VALUES // 3)}0]}}')
        yield "values", {"bad.safetensors": with_length(b'{"a":[' + b"[]," * 20_000_000 + b"[]]}")}
        yield "depth", self.patch(json.dumps(self.info)[:-1] + f', "x": {"[" * 700}{"]" * 700}}}')
        yield "depth", self.patch("[" * 1_000_000)
        yield "depth", {"bad.safetensors": with_length(b'{"a":' * 700 + b"1" + b"}" * 700)}
        yield "names", self.patch(concept="cat" * 100_000)
        yield "names", self.patch(concepts=[self.info["concepts"][0] | {"names": ["x" * 300_000]}])
        yield "names", self.patch(base=self.info["base"] | {"name": "\U0001f408" * 300_000})
        yield "names", self.patch(concepts=[self.info["concepts"][0] | {"names": ["cat\nrm -rf /"]}])
        yield "names", self.patch(concept="cat\x1b[2J")
        for name in (K[:-4] + "9" * 5000 + "_attn2_to_k", f"{K}\n", K.replace("mid", "mid\x1b[2J"), "x" * 300_000):
            yield "names", self.patch(shapes={name: (1, 1, 1)})
        yield "texts", self.patch(settings=self.info["settings"] | {"preserve": "cat, " * 200_000})
        many = {str(n): 0.5 for n in range(9999)}
        yield "texts", self.patch(report={"warnings": ["word " * 13_000] * 60, "erasure": many})
        yield "texts", self.patch(schema=1, report={"warnings": ["word " * 13_000] * 60, "erased": many, "drift": many})
        yield "texts", self.patch(schema=1, settings=self.info["settings"] | {"keep": "cat, " * 200_000})
        yield "statistics", self.patch(schema=1, moments=statistics(30_000))
        yield "texts", self.patch(report={"synonyms": ["w" * 60_000] * 60, "preserve_drift": {"w" * 60_000: 1.0}})
        yield "texts", {"bad.safetensors": with_length(b'{"__metadata__":{"a":"' + b"\\n" * 16_000_000 + b'"}}')}
        yield "texts", {"bad.safetensors": self.wide(header.MOST_HEADER_BYTES - 4096)}
        yield "texts", self.patch(json.dumps(self.info)[:-1] + f', "x": "{"x" * 30_000_000}\U0001f408"}}')
        yield "numbers", self.patch(json.dumps(self.info)[:-1] + f', "x": {"9" * 1_000_000}}}')
        yield "numbers", self.patch(json.dumps(self.info)[:-1] + f', "x": 1.{"9" * 10_000_000}}}')
        yield "numbers", {"bad.safetensors": joined({"x": ("F16", [2**62, 2**62], b"\0\0")})}
        yield "imports", self.mixed(320)
        yield "imports", self.config(f'{{"alpha_pattern": {"[" * 100_000}')
        yield "imports", self.config(json.dumps({"alpha_pattern": {f"to_k{n}": 1 for n in range(150_000)}}))
        yield "embeddings", {"bad.safetensors": joined({f"<s{'9' * 5000}>": ("F16", [1], b"\0\0")})}
        several = {f"<s{n}>": ("F16", [1], b"\0\0") for n in range(header.MOST_TENSORS)}
        yield "embeddings", {"bad.safetensors": joined(several)}
        for text in ("a: &a [x,x]\n" + "".join(f"b{n}: [*a,*a]\n" for n in range(9)), "[" * 30_000, f"Attn: {'9' * 5000}"):
            yield "configs", {"bad.yaml": text.encode()}
        yield "configs", {"bad.yaml": b"Attn:\n  multi_concept:\n" + b"  - [a, object]\n" * 1900}
        yield "configs", {"bad.yaml": b"Attn:\n  max_train_steps: .inf\n"}
        yield "pictures", {"bad.png": png(20_000, 20_000)}
        yield "pictures", {"bad.png": png(8_000, 7_990)}
        yield "states", {"bad.checkpoint": joined({f"tensors.good.{n}": ("F16", [], b"\0\0") for n in range(100_000)})}
        yield "states", {"bad.checkpoint": joined({f"optimizer.{'9' * 5000}.step": ("F32", [], bytes(4))})}

    def random(self) -> tuple[str, Files]:
        """One of random kind and size."""
        rng = self.rng
        kind = rng.choice(
            ["rank and sides", "many modules", "deep", "large", "many keys", "long names", "statistics", "parts"]
        )
        if kind == "rank and sides":
            out, inner, rank = self.size(1, 7e4), self.size(1, 7e4), self.size(1, 7e4)
            while (out + inner) * rank > 10_000_000:
                rank = max(rank // 2, 1)
                out, inner = max(out // 2, 1), max(inner // 2, 1)
            return kind, self.patch(shapes={K: (out, inner, rank)})
        if kind == "many modules":
            return kind, self.patch(shapes=self.layers(self.size(1, 3e4), self.size(1, 40), self.size(1, 40)))
        if kind == "deep":
            opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
            depth = self.size(1, 1e5)
            inner = f"{opened * depth}1{closed * depth}"
            return kind, self.patch(json.dumps(self.info)[:-1] + f', "{rng.choice(["x", "report", "patches"])}": {inner}}}')
        if kind == "large":
            piece = rng.choice(["[]", "{}", '""', "0", "1e5", "null", '"\\u732b"', '{"a":[]}', '"\U0001f408"', "[0,0]"])
            inner = ",".join([piece] * self.size(1, 1e6))
            place = rng.choice(["x", "report", "patches", "concepts", "settings"])
            return kind, self.patch(json.dumps(self.info)[:-1] + f', "{place}": [{inner}]}}')
        if kind == "many keys":
            place, value = rng.choice(["settings", "report", "base"]), rng.choice([0, 0.5, "x", [], {}])
            inner = {rng.choice(["", "x" * 40, "\n"]) + str(n): value for n in range(self.size(1, 3e5))}
            own = {rng.choice(["preserve_drift", "erasure", "evaluation", "imported", "x"]): inner}
            return kind, self.patch(**{place: self.info[place] | rng.choice([inner, own])})
        if kind == "long names":
            name = rng.choice(["x", "9", "\n", "\0", "🐈", "a b ", "a,", "_", "\x1b[1m", "attn2_"]) * self.size(1, 3e5)
            where = rng.choice(["module", "concept", "base", "warning", "preserve", "erasure", "names"])
            changed = {
                "concept": {"concept": name},
                "base": {"base": self.info["base"] | {"name": name}},
                "warning": {"report": {"warnings": [name]}},
                "preserve": {"settings": self.info["settings"] | {"preserve": name}},
                "erasure": {"report": {"erasure": {name: 0.5}, "preserve_drift": {name: 0.5}}},
                "names": {"concepts": [self.info["concepts"][0] | {"names": ["cat", name]}]},
            }
            if where == "module":
                return kind, self.patch(shapes={f"lora_unet_{name}_attn2_to_k": (1, 1, 1)})
            return kind, self.patch(**changed[where])
        if kind == "statistics":
            rows, columns = self.size(1, 3e4), self.size(1, 100)
            return kind, self.patch(statistics=statistics(rows, columns))
        several = self.size(1, 3e4)
        return kind, self.patch(self.stacked(several), {K: (1, 1, min(several, 4000))})

    def layers(self, count: int, rank: int, side: int = 1) -> dict[str, tuple[int, int, int]]:
        return {K.replace("blocks_0", f"blocks_{n}"): (side, side, rank) for n in range(count)}

    def concepts(self, count: int, names: int) -> list[dict]:
        return [
            {"names": [f"c{n} {m}" for m in range(names)], "type": "object", "templates": ["a {}"]} for n in range(count)
        ]

    def stacked(self, count: int) -> dict:
        """What a stacked patch of so many parts of rank 1 says."""
        parts = [{"info": self.own(n), "rank": 1, "strength": 1.0, "modules": "1"} for n in range(count)]
        return {key: value for key, value in self.info.items() if key != "statistics"} | {"patches": parts}

    def own(self, number: int) -> dict:
        few = {key: self.info[key] for key in ("schema", "version", "base", "statistics")}
        return few | {"concept": f"c{number}", "concepts": self.concepts(1, 1), "settings": {}, "report": {"warnings": []}}

    def many_keys(self, count: int) -> bytes:
        return with_length(b'{"__metadata__":{' + b",".join(b'"%d":"x"' % n for n in range(count)) + b"}}")

    def wide(self, count: int) -> bytes:
        """A text whose letters take four bytes in memory, for one of them that is no ASCII."""
        return with_length(b'{"__metadata__":{"a":"' + b"x" * count + "\U0001f408".encode() + b'"}}')

    def mixed(self, rank: int) -> Files:
        """A LoRA with one layer of high rank, to which all others would be brought."""
        shapes = {name: (*shape, 1) for name, shape in self.shapes.items()}
        first = next(iter(shapes))
        return {"bad.safetensors": joined(lora(shapes | {first: (*shapes[first][:2], rank)}))}

    def config(self, text: str) -> Files:
        whole = joined({"unet.x.lora_A.weight": ("F16", [1, 1], b"\0\0")})
        return {"adapter_model.safetensors": whole, "adapter_config.json": text.encode()}

    shapes: dict[str, tuple[int, int]] = {}


def with_length(text: bytes) -> bytes:
    """A safetensors file of a header alone."""
    return struct.pack("<Q", len(text)) + text


def png(width: int, height: int) -> bytes:
    """A black picture of two colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = packer.compress(bytes((width + 7) // 8 + 1) * height) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def renamed(name: str, model: str = "emoji") -> Patch:
    """The demo's patch under another concept's name, as someone could have written it."""
    patch = read_patch(ROOT / "demo/loras/forget-cat.safetensors")
    info = copy.deepcopy(patch.info)
    info["concept"], info["report"]["warnings"], info["base"] = name, [name], info["base"] | {"name": model}
    info["concepts"][0]["names"] = [name]
    return Patch(dict(patch), info)


def write(patch: Patch, path) -> None:
    """A patch's file as someone else's program could have written it: `save_patch` refuses some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(dict(patch), {"fmn.patch": json.dumps(patch.info)}))
