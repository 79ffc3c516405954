"""Recording cross-attention while the webui or Forge draws, by hooks that watch and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor

from ...attention.capture import is_prompt, layer_size
from ...attention.recorder import AttentionRecording
from ..ldm import block_of
from .base import WebuiBase
from .forge import ForgeHost
from .model import adapt


def record_attention(p, text: str) -> tuple[AttentionRecording, Callable[[], None]]:
    """What the sampling that is about to begin attends to for the prompt `text`, filled while it runs, and a function
    that ends the recording.

    To be called before every sampling (a script's `process_before_every_sampling`), with one of the texts of `prompts_of`;
    hires fix samples twice. Of a batch the pictures with that text are recorded, at the steps that have it. Should nobody
    end it, it ends by itself when the next job begins. Raises ForgetError for a model without such layers.
    """
    host = adapt(p.sd_model)
    recording = AttentionRecording(text, host.tokenize(text))
    recording.begin()
    with host.precision():
        embedding, _ = host.conditioning(text)  # with the LoRAs that this picture's prompt is encoded with
    rows = PromptRows(embedding, p.batch_size)
    if isinstance(host, ForgeHost):
        return recording, record_in_forge(host, recording, rows)
    return recording, record_in_webui(host, recording, rows)


def prompts_of(p, prompt: str) -> list[list[str]]:
    """The texts that the host makes of one of its prompts: those between AND, of each every one that it has at some step
    (`[cat:dog:0.5]`, `[cat|dog]`), with single spaces, as the tokenizer reads them all the same. To be called before a
    sampling, as `record_attention`, which takes one of these."""
    from modules import prompt_parser, shared

    each = getattr(p, "step_multiplier", 1)  # some samplers take two steps for one
    later = each * (getattr(p, "hr_second_pass_steps", 0) or p.steps) if getattr(p, "is_hr_pass", False) else None
    (parts,), texts, _ = prompt_parser.get_multicond_prompt_list([prompt])
    schedules = prompt_parser.get_learned_conditioning_prompt_schedules(
        texts, each * p.steps, later, shared.opts.use_old_scheduling
    )
    return [[*dict.fromkeys(" ".join(text.split()) for _, text in schedules[index])] for index, _ in parts]


class PromptRows:
    """Which rows of a batch have the recorded prompt for their context: a forward gives all layers one context, so they
    are found once."""

    def __init__(self, embedding: Tensor, most: int):
        self.embedding, self.most = embedding, most
        self.context: Tensor | None = None
        self.found: tuple[list[int], int] = ([], 0)

    def of(self, context: Tensor, candidates: list[int] | None = None) -> tuple[list[int], int]:
        """Row numbers among the candidates, all by default, and how many of their columns are the prompt's.

        The host makes prompts of one batch equally long: by tiling them, or by something behind the shorter ones.
        """
        if self.context is not context:
            length = len(self.embedding)
            asked = range(len(context)) if candidates is None else candidates
            rows = [row for row in asked if is_prompt(context[row, :length], self.embedding)][: self.most]
            tiled = rows and is_prompt(context[rows[0]], self.embedding)
            self.context, self.found = context, (rows, context.shape[1] if tiled else length)
        return self.found


def record_in_webui(host: WebuiBase, recording: AttentionRecording, rows: PromptRows) -> Callable[[], None]:
    """Watches the outputs of to_q and to_k, whatever the attention in between; returns what ends it."""
    from modules import devices, shared

    queries: dict[str, Tensor] = {}
    size, job = None, shared.state.time_start
    stack = ExitStack()

    def before_unet(module, args):
        nonlocal size
        size = args[0].shape[-2:]
        if shared.state.time_start != job:
            stack.close()

    def read_q(name):
        def hook(module, args, output):
            queries[name] = output

        return hook

    def read_k(name, heads):
        def hook(module, args, output):
            q = queries.pop(name, None)
            found, columns = rows.of(args[0])
            if q is not None and found and size is not None:
                height, width = layer_size(size[0], size[1], q.shape[1])
                place = {"step": shared.state.sampling_step, "columns": columns}
                with devices.without_autocast():
                    recording.add(name, q[found], output[found], heads, (height, width), **place)

        return hook

    stack.callback(host.unet.register_forward_pre_hook(before_unet).remove)
    for name, layer in host.cross_attentions().items():
        stack.callback(layer.linear("to_q").register_forward_hook(read_q(name)).remove)
        stack.callback(layer.linear("to_k").register_forward_hook(read_k(name, layer.heads)).remove)
    return stack.close


def record_in_forge(host: ForgeHost, recording: AttentionRecording, rows: PromptRows) -> Callable[[], None]:
    """Watches by a patch on a clone of the UNet's patcher, which Forge itself drops before the next sampling; returns
    what ends it."""
    from modules import shared

    layers = {block_of(name): (name, layer) for name, layer in host.cross_attentions().items()}
    recorded = True

    def watch(n, context, value, extra):
        at = layers.get((*extra["block"], extra["block_index"]))
        if recorded and at is not None:
            name, layer = at
            found, columns = rows.of(context, extra["cond_indices"])
            if found:
                q, k = layer.linear("to_q")(n[found]), layer.linear("to_k")(context[found])
                height, width = extra["original_shape"][-2:]
                size = layer_size(height, width, n.shape[1])
                place = {"step": shared.state.sampling_step, "columns": columns}
                recording.add(name, q, k, layer.heads, size, **place)
        return n, context, value

    def end():
        nonlocal recorded
        recorded = False

    unet = host.sd_model.forge_objects.unet.clone()
    unet.set_model_attn2_patch(watch)
    host.sd_model.forge_objects.unet = unet
    return end
