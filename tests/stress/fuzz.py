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
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile import MUCH, Hostile  # noqa: E402
from mutations import MUTATIONS, corpus, cut_and_set, lie_in_header, other_tensors, text  # noqa: E402

from demo.host import load_demo_model  # noqa: E402
from fmn_core.convert.config import ImportConfig  # noqa: E402
from fmn_core.convert.exporter import merge  # noqa: E402
from fmn_core.convert.importer import import_patch  # noqa: E402
from fmn_core.erasure.config import make_config  # noqa: E402
from fmn_core.erasure.forget import forget  # noqa: E402
from fmn_core.errors import ForgetError  # noqa: E402
from fmn_core.files.names import DEVICES, folder_and_name, slug  # noqa: E402
from fmn_core.inspection.describe import text_of  # noqa: E402
from fmn_core.inspection.inspect import inspect_patch  # noqa: E402
from fmn_core.inspection.plot import draw_inspection  # noqa: E402
from fmn_core.inversion.embedding import read_embedding  # noqa: E402
from fmn_core.patch.file import is_patch, read_patch, serialize  # noqa: E402
from fmn_core.patch.patch import Patch  # noqa: E402
from fmn_core.patch.stack import stack, unstack  # noqa: E402
from fmn_core.patch.summary import summary  # noqa: E402
from fmn_core.patch.weighted import WeightedPatch  # noqa: E402
from fmn_core.text.concept import make_concepts  # noqa: E402
from fmn_core.text.tokens import concept_mask  # noqa: E402
from fmn_core.training.checkpoint import Checkpoint, State  # noqa: E402

SLOW = 5.0  # seconds for one answer


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
