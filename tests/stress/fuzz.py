"""Files and prompts made to harm, by the thousand: each gets an answer or a sentence, in little time and memory.

python tests/stress/fuzz.py [--runs N] [--hostile N] [--seed S]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile import MUCH, Hostile  # noqa: E402

from demo.host import load_demo_model  # noqa: E402
from fmn_core.convert.config import ImportConfig  # noqa: E402
from fmn_core.convert.exporter import PER_LEVEL, merge, to_diff, to_peft  # noqa: E402
from fmn_core.convert.importer import import_patch  # noqa: E402
from fmn_core.erasure.config import make_config  # noqa: E402
from fmn_core.erasure.forget import forget  # noqa: E402
from fmn_core.errors import ForgetError  # noqa: E402
from fmn_core.files.names import DEVICES, folder_and_name, slug  # noqa: E402
from fmn_core.inspection.describe import text_of  # noqa: E402
from fmn_core.inspection.inspect import inspect_patch  # noqa: E402
from fmn_core.inspection.plot import draw_inspection  # noqa: E402
from fmn_core.inversion.embedding import read_embedding  # noqa: E402
from fmn_core.lora.keys import dotted, one_name  # noqa: E402
from fmn_core.patch.file import is_patch, read_patch, serialize  # noqa: E402
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch  # noqa: E402
from fmn_core.patch.stack import stack, unstack  # noqa: E402
from fmn_core.patch.summary import summary  # noqa: E402
from fmn_core.patch.weighted import WeightedPatch  # noqa: E402
from fmn_core.text.concept import make_concepts  # noqa: E402
from fmn_core.text.tokens import concept_mask  # noqa: E402
from fmn_core.training.checkpoint import Checkpoint, State  # noqa: E402

SLOW = 5.0  # seconds for one answer
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


class Fuzzer:
    """Has every reader look at what it is given, and counts the answers; what harms is written to a file and told."""

    def __init__(self, host, folder: Path, seed: int):
        self.host, self.folder, self.rng = host, folder, random.Random(seed)
        self.path = folder / "bad.safetensors"
        self.corpus = corpus()
        self.good = read_patch(ROOT / "demo/loras/forget-car.safetensors")
        self.small = self.read_whole(self.corpus[0])
        self.answers: dict[str, Counter] = {}
        self.harms: list[str] = []
        self.slowest = 0.0
        for raw in self.corpus:
            self.file(raw)
        self.first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def read_whole(self, raw: bytes) -> Patch:
        self.path.write_bytes(raw)
        return read_patch(self.path)

    def memory(self) -> int:
        """Bytes over the most that the whole files took."""
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.first) * 1024

    def ask(self, what: str, reader: Callable[[], object], given: object) -> object:
        """An answer, or None for a sentence; anything else is harm."""
        start, answer = time.monotonic(), None
        cpu = time.process_time()
        count = self.answers.setdefault(what, Counter())
        try:
            answer = reader()
            count["answered"] += 1
        except ForgetError as error:
            count["refused with a sentence"] += 1
            if len(str(error)) > 5000:
                self.harm(what, "a sentence of a page", given)
        except BaseException as error:
            count["HARM"] += 1
            inner = [f for f in traceback.extract_tb(error.__traceback__) if "fmn_core" in f.filename][-1:]
            where = "".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in inner)
            told = "".join(traceback.format_exception(error)[-3:])
            self.harm(what, f"{type(error).__name__} at {where}\n{told}", given)
        seconds = min(time.monotonic() - start, time.process_time() - cpu)
        self.slowest = max(self.slowest, seconds)
        if seconds > SLOW:
            self.harm(what, f"{seconds:.1f} s", given)
        return answer

    def harm(self, what: str, why: str, given: object) -> None:
        kept = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}-{len(self.harms)}")
        kept.write_bytes(given if isinstance(given, bytes) else repr(given).encode("utf-8", "backslashreplace"))
        self.harms.append(f"{what}: {why}\n  (input in {kept})")

    def file(self, raw: bytes) -> None:
        """Every reader of files on these bytes."""
        self.path.write_bytes(raw)
        out = self.path.with_name("out.safetensors")
        self.ask("is it a patch?", lambda: is_patch(self.path), raw)
        patch = self.ask("read a patch", lambda: read_patch(self.path), raw)
        if patch is not None:
            self.uses(patch, raw)
        self.ask("import", lambda: import_patch(self.host, self.path, ImportConfig(energy=0.9)), raw)
        self.ask("read learned words", lambda: read_embedding(self.path, {"clip_l": 112}), raw)
        self.ask("merge into a checkpoint", lambda: merge(self.path, self.small, 1.0, out).unlink(), raw)
        assert sorted(file.name for file in self.folder.iterdir()) == ["bad.safetensors"], "a file was left"

    def uses(self, patch: Patch, raw: bytes) -> None:
        """What is done with a patch that could be read."""
        from fmn_core.hosts.comfy.apply import apply_patch

        self.ask("say what it forgets", lambda: summary(patch), raw)
        inspection = self.ask("inspect", lambda: inspect_patch(patch, self.host, self.path), raw)
        if inspection is not None:
            self.ask("tell as text", lambda: text_of(inspection), raw)
            self.ask("tell as JSON", lambda: json.dumps(inspection.plain()), raw)
            if self.rng.random() < 0.05:
                self.ask("draw", lambda: draw_inspection(inspection), raw)
        self.ask("apply", lambda: apply_patch(self.host.patcher, patch, 1.0), raw)
        self.ask("stack", lambda: summary(stack([WeightedPatch(patch, 0.7), WeightedPatch(self.small)])), raw)
        self.ask("take apart", lambda: [slug(part.name) for part in unstack(patch)], raw)
        self.ask("write anew", lambda: serialize(patch, "again"), raw)
        self.ask("copy", lambda: copy.deepcopy(patch.info), raw)

    def name(self, given: str) -> None:
        """A name for a file stays in its folder, on any system."""
        plain = slug(given)
        assert plain and not set(plain) & set('/\\<>:"|?*. \0') and len(plain.encode()) <= 121, plain
        assert plain.upper() not in DEVICES
        found = self.ask("name of a file", lambda: folder_and_name(given, "output/loras"), given)
        if found:
            root = Path("/root/output")
            inside = Path(os.path.normpath(root / found))
            assert (inside == root or root in inside.parents) and "\\" not in found and found.isprintable(), found
            assert not any(part.split(".")[0].strip().upper() in DEVICES for part in found.split("/"))

    def prompt(self, given: str, whole: bool) -> None:
        """A prompt and a concept of this text."""

        def columns():
            concepts = make_concepts(
                given, "custom" if "{}" in given else "object", given if "{}" in given else "a photo of {}"
            )
            for concept in concepts[:3]:
                for prompt, name in concept.prompts[:2]:
                    concept_mask(self.host, name, prompt, self.rng.choice(["concept", "concept_and_end", "concept_onward"]))

        self.ask("find a concept in a prompt", columns, given)
        self.ask("read a prompt", lambda: self.host.token_embeddings(given), given)
        if whole:
            preserve = text(self.rng, 3) if self.rng.random() < 0.5 else ""
            self.ask(
                "forget",
                lambda: serialize(forget(self.host, given, make_config(preserve=preserve))[0], "x"),
                (given, preserve),
            )

    def checkpoint(self) -> None:
        """A checkpoint that is damaged is as good as none, and changes nothing."""
        parameters = [torch.ones(3, 2), torch.ones(2)]
        state = State(parameters, torch.optim.AdamW(parameters), torch.Generator(), tensors={"good": []}, figures={"x": []})
        checkpoint = Checkpoint(self.folder / "checkpoints", every=0)
        checkpoint.begin(self.host, [])
        with checkpoint:
            checkpoint.resume(state, lambda: None)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            state.optimizer.step()
            state.losses.append(1.0)
            checkpoint.keep()
            raw = checkpoint.file.read_bytes()
            bad = self.rng.choice([cut_and_set, lie_in_header, other_tensors])(self.rng, raw)
            checkpoint.file.write_bytes(bad)
            before = state.stored()
            if not self.ask("go on from a checkpoint", lambda: checkpoint.resume(state, lambda: None) or None, bad):
                after = state.stored()
                assert after.keys() == before.keys() or state.mark, "half of a checkpoint was taken"

    def run(self, runs: int) -> None:
        """`runs` files; a name for each, a prompt for every tenth, and a whole forgetting for every hundredth."""
        for number in range(runs):
            self.file(self.rng.choice(MUTATIONS)(self.rng, self.rng.choice(self.corpus)))
            self.name(text(self.rng, 8))
            if number % 10 == 0:
                self.prompt(text(self.rng, 40 if number % 70 == 0 else 6), whole=number % 100 == 0)
                self.checkpoint()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="how many files")
    parser.add_argument(
        "--hostile", type=int, default=200, help="how many small files that would take much, beside the known"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import logging

    logging.getLogger().setLevel(logging.ERROR)
    host = load_demo_model()
    harmed = options.runs > 0 and run_changed(host, options.runs, options.seed)
    return int(run_hostile(host, options.hostile, options.seed) or harmed)


def run_changed(host, runs: int, seed: int) -> bool:
    """Changed files, names and prompts: prints what came of them, and returns whether any did harm."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(host, Path(folder), seed)
        fuzzer.run(runs)
    print("| asked to | answered | refused with a sentence | harm |\n|---|---|---|---|")
    for what, count in fuzzer.answers.items():
        print(f"| {what} | {count['answered']} | {count['refused with a sentence']} | {count['HARM']} |")
    for where, count in Counter(harm.splitlines()[0] for harm in fuzzer.harms).most_common():
        print(f"HARM {count} times: {where}")
    for harm in fuzzer.harms[:8]:
        print(harm)
    print(
        f"\n{runs} files, seed {seed}, {time.monotonic() - start:.0f} s: {len(fuzzer.harms)} did harm; "
        f"slowest answer {fuzzer.slowest:.1f} s; {max(fuzzer.memory(), 0) >> 20} MB over what whole files take, of "
        f"{MUCH >> 20}."
    )
    return bool(fuzzer.harms) or fuzzer.memory() > MUCH


def run_hostile(host, count: int, seed: int) -> bool:
    """Small files that would take much: prints what they took, and returns whether any did harm."""
    with tempfile.TemporaryDirectory() as folder:
        hostile = Hostile(host, Path(folder), seed)
        hostile.run(count)
    print(f"{hostile.table()}\n\n{len(hostile.outcomes)} files, seed {seed}: {len(hostile.harms)} did harm.")
    for harm in hostile.harms:
        print(f"HARM {harm}")
    return bool(hostile.harms)


if __name__ == "__main__":
    sys.exit(main())
