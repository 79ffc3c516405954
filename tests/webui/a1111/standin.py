"""What the stand-ins of both webuis share: strict names, the demo model's parts, chunks of prompts."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import types
from collections import namedtuple
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from standin_prompts import parse_prompt_attention
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

REACHED: list[str] = []  # every name that something asked for and that is not here


class Reached(AttributeError):
    """Something reached for a name of the webui's that the stand-in does not have."""


def reach(owner: str, name: str):
    """Raises for a name that is not there and remembers it, but for Python's own names with underscores around them."""
    if not (name.startswith("__") and name.endswith("__")):
        REACHED.append(f"{owner}.{name}")
    raise Reached(f"{owner} has no {name} here: the extension may use only what tests/webui/a1111 names.")


def strict(module: str) -> None:
    """Makes a module raise and remember names that it does not have."""
    sys.modules[module].__getattr__ = lambda name: reach(module, name)


class Options:
    """`shared.opts` or `shared.cmd_opts`: values by name."""

    def __init__(self, owner: str, **values):
        self.__dict__.update(values)
        self.__dict__["_owner"] = owner

    def __getattr__(self, name):
        reach(self.__dict__["_owner"], name)


class Missing:
    """The last finder on sys.meta_path: remembers submodules of the webui that are not here."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("modules", "backend", "modules_forge") and "." in name:
            REACHED.append(name)


sys.meta_path.append(Missing)


class State:
    """`shared.state`: what the webui tells of the job that runs."""

    def __init__(self):
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job, self.job_no, self.job_count, self.job_timestamp = "", 0, 0, "0"
        self.sampling_step = self.sampling_steps = self.id_live_preview = 0
        self.current_image = self.textinfo = self.time_start = None

    def begin(self, job="(unknown)"):
        self.__init__()
        self.job, self.job_count, self.time_start = job, -1, time.time()

    def end(self):
        self.job, self.job_count = "", 0

    def interrupt(self):
        self.interrupted = True

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = 0

    def assign_current_image(self, image):
        self.current_image = image
        self.id_live_preview += 1


@lru_cache(None)
def exported() -> tuple[Path, dict]:
    """The demo model's folder as the webui gets it, and its .yaml; FMN_WEBUI_MODEL names one that is there already."""
    import yaml

    folder = Path(os.environ.get("FMN_WEBUI_MODEL") or tempfile.mkdtemp(prefix="fmn-webui-"))
    if not any(folder.iterdir()):
        export(folder)
    return folder, yaml.safe_load(next(folder.glob("*.yaml")).read_text())


def export(folder: Path) -> None:
    from demo.export import export_webui

    with torch.no_grad():
        export_webui(folder, autoencoder="fmn_core.hosts.webui.taesd.TAESD")


@contextmanager
def text_encoders_by_size():
    """Context in which CLIPTextModel.from_pretrained reads sizes alone, as in the webui, which has the weights from the
    checkpoint."""
    from transformers import CLIPTextConfig, CLIPTextModel

    def untrained(folder):
        return CLIPTextModel(CLIPTextConfig.from_pretrained(folder))

    with mock.patch.object(CLIPTextModel, "from_pretrained", untrained):
        yield


def text_model_named(transformer, weights: dict) -> dict:
    """A checkpoint's weights with the text encoder's as this transformers calls them: since 5 it has no `text_model`."""
    if hasattr(transformer, "text_model"):
        return weights
    return {key.replace(".transformer.text_model.", ".transformer."): weight for key, weight in weights.items()}


def make_ldm_importable() -> None:
    """ldm's LatentDiffusion is a LightningModule, of which it needs only what a Module has; open_clip is SD2's alone."""
    from demo.launch_comfyui import name_missing_operators

    name_missing_operators()
    lightning, utilities = types.ModuleType("pytorch_lightning"), types.ModuleType("pytorch_lightning.utilities")
    distributed = types.ModuleType("pytorch_lightning.utilities.distributed")
    lightning.LightningModule = type("LightningModule", (nn.Module,), {"device": torch.device("cpu")})
    distributed.rank_zero_only = lambda function: function
    modules = {m.__name__: m for m in (lightning, utilities, distributed, types.ModuleType("open_clip"))}
    for name, module in modules.items():
        sys.modules.setdefault(name, module)


class CheckpointInfo:
    def __init__(self, file: Path):
        self.filename, self.name, self.model_name = str(file), file.name, file.stem
        self.shorthash, self.sha256 = "0123456789", "0123456789" + "ab" * 27
        self.title = f"{file.name} [{self.shorthash}]"


Fix = namedtuple("PromptChunkFix", ["offset", "embedding"])


class Chunk:
    def __init__(self):
        self.tokens, self.multipliers, self.fixes = [], [], []


class Embedding:
    def __init__(self, name, vec):
        self.name, self.vec, self.vectors, self.shape = name, vec, vec.shape[0], vec.shape[-1]


class EmbeddingDatabase:
    """Learned words by the ids of their names; `fixes` are those of the chunks that the encoder gets next."""

    def __init__(self):
        self.ids_lookup, self.word_embeddings, self.fixes = {}, {}, None

    def register(self, embedding, ids):
        self.ids_lookup.setdefault(ids[0], []).append((ids, embedding))
        self.word_embeddings[embedding.name] = embedding

    def find_embedding_at_position(self, tokens, offset):
        for ids, embedding in self.ids_lookup.get(tokens[offset], ()):
            if tokens[offset : offset + len(ids)] == ids:
                return embedding, len(ids)
        return None, None


class EmbeddingsWithFixes(nn.Module):
    """The token embedding, with learned words put in at the chunk's fixes; `owner.fixes` holds these once."""

    def __init__(self, wrapped, owner):
        super().__init__()
        self.wrapped, self.embeddings = wrapped, owner
        self.weight = wrapped.weight

    def forward(self, input_ids):
        fixes, self.embeddings.fixes = self.embeddings.fixes, None
        rows = self.wrapped(input_ids)
        if not any(fixes or ()):
            return rows
        changed = []
        for row, several in zip(rows, fixes, strict=True):
            for offset, embedding in several:
                start, end = offset + 1, offset + 1 + embedding.vectors
                row = torch.cat([row[:start], embedding.vec.to(row), row[end:]])
            changed.append(row)
        return torch.stack(changed)


class Chunker:
    """Chunks of 75 tokens between start and end, weights, BREAK and learned words, as both webuis make them.

    A subclass sets tokenizer, database, fixes_owner and chunk_length, and defines encode_with_transformers(tokens).
    """

    chunk_length = 75

    def set_ids(self):
        self.id_start, self.id_end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.id_pad = self.id_end

    def tokenize(self, texts):
        return self.tokenizer(texts, truncation=False, add_special_tokens=False)["input_ids"]

    def close(self, chunk):
        rest = self.chunk_length - len(chunk.tokens)
        chunk.tokens = [self.id_start, *chunk.tokens, *[self.id_end] * (rest + 1)]
        chunk.multipliers = [1.0, *chunk.multipliers, *[1.0] * (rest + 1)]
        return chunk

    def tokenize_line(self, line):
        parsed = parse_prompt_attention(line)
        chunks, chunk, count = [], Chunk(), 0
        for ids, (text, weight) in zip(self.tokenize([text for text, _ in parsed]), parsed, strict=True):
            if (text, weight) == ("BREAK", -1):
                chunks.append(self.close(chunk))
                chunk = Chunk()
                continue
            position = 0
            while position < len(ids):
                embedding, length = self.database.find_embedding_at_position(ids, position)
                vectors = 1 if embedding is None else embedding.vectors
                if len(chunk.tokens) + vectors > self.chunk_length:
                    chunks.append(self.close(chunk))
                    chunk = Chunk()
                if embedding is not None:
                    chunk.fixes.append(Fix(len(chunk.tokens), embedding))
                chunk.tokens += [ids[position] if embedding is None else 0] * vectors
                chunk.multipliers += [weight] * vectors
                position, count = position + (length or 1), count + vectors
        if chunk.tokens or not chunks:
            chunks.append(self.close(chunk))
        return chunks, count

    def process_texts(self, texts):
        lines = [self.tokenize_line(text) for text in texts]
        return [chunks for chunks, _ in lines], max(count for _, count in lines)

    def process_tokens(self, tokens, multipliers):
        z = self.encode_with_transformers(torch.asarray(tokens))
        mean = z.mean()
        z = z * torch.asarray(multipliers).to(z)[..., None]
        return z * (mean / z.mean())

    def encode_texts(self, texts):
        batch, _ = self.process_texts(texts)
        parts = []
        for i in range(max(map(len, batch))):
            chunks = [row[i] if i < len(row) else self.close(Chunk()) for row in batch]
            self.fixes_owner.fixes = [chunk.fixes for chunk in chunks]
            parts.append(self.process_tokens([c.tokens for c in chunks], [c.multipliers for c in chunks]))
        return torch.hstack(parts)


def lora_modules(file: str, unet_names) -> dict[str, tuple]:
    """ldm name of a layer in the UNet, or the text encoder's, with `_` -> (up, down, alpha) of a kohya file.

    The webui counts SD1's three blocks a level, whatever the model has.
    """
    from safetensors.torch import load_file

    from fmn_core.lora.keys import one_name

    known = {f"lora_unet_{one_name(name, 3)}": name.replace(".", "_") for name in unet_names}
    known |= {f"lora_unet_{name}": name for name in known.values()}
    tensors, found = load_file(file), {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            start = key.removesuffix(".lora_down.weight")
            name = known.get(start, start.removeprefix("lora_te_text_model_"))
            found[name] = tuple(tensors[start + part] for part in (".lora_up.weight", ".lora_down.weight", ".alpha"))
    return found


def layer_of(name: str) -> str:
    """A layer's name in `lora_modules` from what the webui calls it."""
    for start in ("diffusion_model_", "clip_l_", "transformer_", "text_model_"):
        name = name.removeprefix(start)
    return name
