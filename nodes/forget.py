"""Forget Concept."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..fmn_core.erasure.config import CONCEPT_HELP, MAIN_FIELDS, PRESET_HELP, PRESETS, ForgetConfig, make_config
from ..fmn_core.erasure.forget import forget
from ..fmn_core.errors import ForgetError
from ..fmn_core.files.atomic import save_under_next
from ..fmn_core.hosts.comfy.model import ComfyHost
from ..fmn_core.patch.file import save_patch
from ..fmn_core.patch.patch import Patch
from ..fmn_core.patch.summary import summary
from .patch import new_paths
from .schema import ForgetSettings, LoraModel, LossMap, schema, settings_inputs
from .unfinished import checkpoint_for


class ForgetConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_ForgetConcept",
            display_name="Forget Concept",
            description="Makes a LoRA that lets the model forget concepts: in closed form, by attention re-steering, or "
            "by both, and hardened against words that bring the concept back.",
            search_aliases=["unlearn", "erase concept", "forget-me-not", "concept erasure"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that should forget. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "concept",
                    default="cat",
                    multiline=True,
                    tooltip=CONCEPT_HELP,
                ),
                *settings_inputs(ForgetConfig, only=MAIN_FIELDS[:1]),
                io.Combo.Input("preset", options=list(PRESETS), default="fast", tooltip=PRESET_HELP),
                *settings_inputs(ForgetConfig, only=MAIN_FIELDS[1:]),
                ForgetSettings.Input(
                    "settings",
                    optional=True,
                    tooltip="All other settings, from the Forget Settings node of this preset. Without it: its defaults.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures that show the concept, for the presets that train on pictures: all but `fast` (a VAE "
                    "is needed then). Of several concepts as many pictures each, in the order of their lines. Without them "
                    "the model makes its own.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the pictures the concept is, for all presets but `fast`: only there attention counts. "
                    "One mask for all pictures or one for each, of their size.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for pictures; without pictures it only makes previews better."
                ),
            ],
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The patch: for Apply FMN Patch, Save Forget Patch or Load LoRA Model."
                ),
                LossMap.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                LoraModel.Output(
                    display_name="unet_lora",
                    tooltip="What `train_layers: whole_unet` trains outside the cross-attention: an ordinary LoRA, for Load "
                    "LoRA Model, beside the patch. Save Forget Patch writes it too. Else it is empty.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, concept, preset, *, settings=None, images=None, mask=None, vae=None, **main
    ) -> io.NodeOutput:
        config = make_config(preset, **main, **settings_for(preset, settings))
        with torch.inference_mode(False):  # the graph runs in inference mode, whose tensors autograd refuses
            images, mask = (None if x is None else x.clone() for x in (images, mask))
            host = ComfyHost(model, clip, vae)
            with checkpoint_for(cls, save_unfinished) as checkpoint:
                patch, losses = forget(host, concept, config, images=images, mask=mask, checkpoint=checkpoint)
        return io.NodeOutput(patch, {"loss": losses}, patch.unet_lora, ui=ui.PreviewText(summary(patch)))


class ForgetSettingsNode(io.ComfyNode):
    """The settings of one preset that Forget Concept does not show; `config` is its class."""

    config: type[ForgetConfig]

    @classmethod
    def define_schema(cls):
        preset = cls.config.preset
        return schema(
            node_id=f"FMN_ForgetSettings_{preset}",
            display_name=f"Forget Settings ({preset})",
            description=f"How the preset `{preset}` of Forget Concept works: all that it reads beside what stands there.",
            search_aliases=["forget-me-not settings", "erasure settings"],
            inputs=settings_inputs(cls.config, without=MAIN_FIELDS),
            outputs=[ForgetSettings.Output(display_name="settings", tooltip="For `settings` of Forget Concept.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput({"preset": cls.config.preset, **settings})


class FastSettings(ForgetSettingsNode):
    config = PRESETS["fast"]


class PaperSettings(ForgetSettingsNode):
    config = PRESETS["paper"]


class BalancedSettings(ForgetSettingsNode):
    config = PRESETS["balanced"]


class RobustSettings(ForgetSettingsNode):
    config = PRESETS["robust"]


SETTINGS_NODES = [FastSettings, PaperSettings, BalancedSettings, RobustSettings]


def settings_for(preset: str, settings: dict | None) -> dict:
    """The settings that a node gives, for this preset; raises ForgetError where they are another's."""
    settings = dict(settings or {"preset": preset})
    given = settings.pop("preset", None)
    if given != preset:
        raise ForgetError(
            f"The preset is `{preset}`, and the settings are for `{given}`: connect Forget Settings ({preset}), or choose "
            f"`{given}`."
        )
    return settings


def save_unfinished(patch: Patch) -> Path:
    """Writes the patch of a training that was stopped beside the others; returns the file."""
    paths = new_paths("forget-%concept%-unfinished", patch)
    return save_under_next(paths, lambda path: save_patch(patch, path))[0]
