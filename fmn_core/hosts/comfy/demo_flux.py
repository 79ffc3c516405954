"""The second demo model in ComfyUI: Flux in small widths, MiniLM in the places of CLIP and T5, the first model's latents."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch.nn.functional as F
from comfy.text_encoders.bert import BertModel
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from .demo_sd import require_whole

MARKER = "emoji_flux.latents"  # in the checkpoint: mean and standard deviation of the latents
VAE_SCALE = 0.18215  # SD1's, which the autoencoder divides by as the first model's does
TENSORS = {"transformer": 112, "text encoder": 102, "autoencoder": 136}
TOKENS, WIDTH = 32, 384
START, END, PADDING = 101, 102, 0
TEXT_MODEL = {
    "hidden_size": WIDTH,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "pad_token_id": PADDING,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


class WordPieces:
    """BERT's tokenizer in the shape in which ComfyUI asks one."""

    def __init__(self, words: list[str]):
        self.tokenizer = BertWordPieceTokenizer({word: index for index, word in enumerate(words)})

    @classmethod
    def from_pretrained(cls, vocabulary: Tensor) -> WordPieces:
        """Reads a vocabulary, one word a line, from its bytes."""
        return cls(bytes(vocabulary.cpu().numpy()).decode().splitlines())

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


class MiniLMPieces(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 (the host's own signature)
        self.vocabulary = tokenizer_data["vocabulary"]
        super().__init__(
            self.vocabulary,
            TOKENS,
            pad_with_end=False,
            pad_token=PADDING,
            embedding_directory=embedding_directory,
            embedding_size=WIDTH,
            embedding_key="minilm",
            tokenizer_class=WordPieces,
        )

    def state_dict(self):
        return {"vocabulary": self.vocabulary}


class MiniLMTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006
        super().__init__(embedding_directory, tokenizer_data, tokenizer=MiniLMPieces, name="minilm")


class MiniLM(comfy.sd1_clip.SDClipModel):
    """all-MiniLM-L6-v2: last hidden states, zero after the end token, and their mean over the tokens, of length 1."""

    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT_MODEL),
            model_class=BertModel,
            special_tokens={"start": START, "end": END, "pad": PADDING},
            layer_norm_hidden_state=False,
            enable_attention_masks=True,
            zero_out_masked=True,
            model_options=model_options,
        )

    def forward(self, tokens):
        hidden = super().forward(tokens)[0]
        return hidden, F.normalize(hidden.sum(1), dim=1)  # the sum has the mean's direction


class MiniLMModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=MiniLM, name="minilm")


class EmojiLatents(comfy.latent_formats.LatentFormat):
    """The first model's latents at mean 0 and standard deviation 1."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.scale_factor, self.shift_factor = VAE_SCALE / std, mean / VAE_SCALE

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


class EmojiFlux(comfy.supported_models.FluxSchnell):
    """The second demo model; known by a key of its own, so that no other checkpoint is taken for it."""

    unet_extra_config = {"num_heads": 4, "axes_dim": [16, 24, 24], "out_channels": 4}
    required_keys = {MARKER: None}
    sampling_settings = {"multiplier": 1.0, "shift": 1.5}
    latent_format = EmojiLatents
    native_size = 128

    def get_model(self, state_dict, prefix="", device=None):
        self.latents = state_dict[MARKER]
        self.latent_format = EmojiLatents(*self.latents.tolist())
        return super().get_model(state_dict, prefix, device)

    def process_unet_state_dict(self, state_dict):
        return require_whole("transformer", super().process_unet_state_dict(state_dict), TENSORS)

    def process_unet_state_dict_for_saving(self, state_dict):
        return {**super().process_unet_state_dict_for_saving(state_dict), MARKER: self.latents}

    def process_clip_state_dict(self, state_dict):
        return require_whole("text encoder", super().process_clip_state_dict(state_dict), TENSORS)

    def process_vae_state_dict(self, state_dict):
        return require_whole("autoencoder", super().process_vae_state_dict(state_dict), TENSORS)

    def clip_target(self, state_dict={}):  # noqa: B006
        return comfy.supported_models_base.ClipTarget(MiniLMTokenizer, MiniLMModel)
