"""The text encoder: CLIP's layout and vocabulary, trained to say what a caption says before any picture is drawn.

Trained together with the UNet from the start, a prompt has no visible hold on the picture for a long time.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..host import comfyui_folder
from ..vocabulary import BACKGROUNDS, COLOURS, COUNTS, KINDS, OBJECTS, PEOPLE, STYLES
from .pictures import Scene, caption

LENGTH = 77
START, END = 49406, 49407
FIELDS = {  # what a caption can say; "" for nothing
    "object": ("", *OBJECTS, *KINDS.values()),
    "style": ("", *STYLES),
    "person": ("", *PEOPLE),
    "colour": ("", *COLOURS),
    "background": ("", *BACKGROUNDS),
    "count": ("", *COUNTS),
}
CONFIG = {
    "vocab_size": 49408, "hidden_size": 112, "intermediate_size": 448, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH, "hidden_act": "quick_gelu", "projection_dim": 112,
    "bos_token_id": START, "eos_token_id": END, "pad_token_id": END,
}  # fmt: skip


def make_tokenizer(comfyui: Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens, from the vocabulary that every ComfyUI carries."""
    folder = comfyui_folder(comfyui) / "comfy/sd1_tokenizer"
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


class Words:
    """Token ids of captions, and the few hundred rows that training needs: row 0 stands for every word unknown."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        dice = random.Random(0)
        every = {Scene(name) for name in OBJECTS} | {Scene(person=name) for name in PEOPLE}
        for name in OBJECTS:
            every |= {Scene(name, style=style) for style in STYLES} | {Scene(name, count=count) for count in COUNTS}
            every |= {Scene(name, colour=colour) for colour in COLOURS}
            every |= {Scene(name, background=background) for background in BACKGROUNDS}
        seen = {token for scene in sorted(every) for _ in range(60) for token in self.ids(caption(scene, dice)[0])}
        self.known = sorted(seen | {START, END})
        self.row = {token: row for row, token in enumerate(self.known, 1)}

    def ids(self, words):
        """Token ids of some words, without start and end."""
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]

    def rows(self, ids):
        """[77] rows of a caption's tokens between start, end and padding."""
        ids = [START, *ids[: LENGTH - 2], END]
        return [self.row.get(token, 0) for token in ids + [END] * (LENGTH - len(ids))]


def clip_text_model(**changes) -> nn.Module:
    """CLIP's text transformer; older and newer transformers hold it at different depths."""
    model = CLIPTextModel(CLIPTextConfig(**{**CONFIG, **changes}))
    return getattr(model, "text_model", model)


def make_text_encoder(words: Words) -> nn.Module:
    """The model on the known rows alone; `with_full_table` puts them in their places."""
    rows = len(words.known) + 1
    model = clip_text_model(vocab_size=rows, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    nn.init.normal_(model.embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(model.embeddings.position_embedding.weight, std=0.02)
    return model


def hidden_states(model, rows):
    """[B, 77, 112] of rows [B, 77], after the last layer norm, as SD1's UNet takes them."""
    return model(input_ids=rows).last_hidden_state


def with_full_table(weights: dict, words: Words) -> dict:
    """The state dict with all 49,408 rows: those of unknown words hold row 0."""
    name = "embeddings.token_embedding.weight"
    table = weights[name][0].repeat(CONFIG["vocab_size"], 1)
    table[words.known] = weights[name][1:]
    return {**weights, name: table}


def _example(words, dice):
    """One caption as rows, what it says by field, and the column where each name of it ends."""
    name = dice.choice(list(OBJECTS))
    scene = dice.choice(
        [Scene(name, dice.choice(STYLES))] * 6
        + [Scene(name)] * 2
        + [Scene(person=dice.choice(list(PEOPLE))), Scene(name, count=dice.choice(list(COUNTS)))]
        + [Scene(name, colour=dice.choice(list(COLOURS))), Scene(name, background=dice.choice(list(BACKGROUNDS)))]
        + [Scene(person=dice.choice(list(PEOPLE)), background=dice.choice(list(BACKGROUNDS)))]
    )
    text, said = caption(scene, dice)
    if dice.random() < 0.05:
        text, said = "", Scene()
    parts = text.split()
    while parts and dice.random() < 0.25:  # words it will never know should leave the rest alone
        parts.insert(dice.randrange(len(parts) + 1), "?")
    ids, ends, said_by = [], {}, said._asdict()
    for part in parts:
        ids += [-1] if part == "?" else words.ids(part)
        for field, value in said_by.items():
            if value and part.strip(",") == value.split()[-1]:
                ends[field] = len(ids)  # one more for the start token
    return words.rows(ids), len(ids) + 1, [FIELDS[field].index(said_by[field]) for field in FIELDS], ends


def train_text_encoder(model, words, run, batch=64, rate=2e-3):
    """Trains the end token's and the padding's columns to tell all that the caption says, and a name's column the name."""
    width = CONFIG["hidden_size"]
    heads = nn.ModuleDict({field: nn.Linear(width, len(names)) for field, names in FIELDS.items()}).to(run.device)
    both = nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(both.parameters(), rate, weight_decay=0.01)
    for step in run.steps(both, optimizer, lambda done: rate * run.cosine(done)):
        dice = random.Random(run.integers(2**31, (1,)).item())
        rows, end, said, names = zip(*(_example(words, dice) for _ in range(batch)), strict=True)
        hidden = hidden_states(model, torch.tensor(rows, device=run.device))
        said = torch.tensor(said, device=run.device)
        every = torch.arange(batch)
        later = [dice.randrange(first, LENGTH) for first in end]
        loss = 0
        for index, field in enumerate(FIELDS):
            for columns in (end, later):
                loss = loss + F.cross_entropy(heads[field](hidden[every, list(columns)]), said[:, index])
            here = [(row, where[field]) for row, where in enumerate(names) if field in where]
            if here:
                row, column = map(list, zip(*here, strict=True))
                loss = loss + F.cross_entropy(heads[field](hidden[row, column]), said[row, index])
        run.backward(loss)
        run.update(step, loss=loss.item())
