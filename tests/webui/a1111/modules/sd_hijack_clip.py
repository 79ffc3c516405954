import torch
from standin import Chunker, strict


class FrozenCLIPEmbedderWithCustomWords(Chunker, torch.nn.Module):
    """The wrapper around ldm's FrozenCLIPEmbedder."""

    def __init__(self, wrapped, hijack):
        torch.nn.Module.__init__(self)
        self.wrapped, self.hijack, self.tokenizer = wrapped, hijack, wrapped.tokenizer
        self.set_ids()

    @property
    def database(self):
        return self.hijack.embedding_db

    @property
    def fixes_owner(self):
        return self.hijack

    def encode_with_transformers(self, tokens):
        return self.wrapped.transformer(input_ids=tokens).last_hidden_state

    def forward(self, texts):
        return self.encode_texts(texts)


strict(__name__)
