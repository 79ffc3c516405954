"""Evaluate Forget Patch."""

from __future__ import annotations

import json
import logging

import torch
from comfy_api.latest import io, ui

from ..fmn_core.evaluation.config import EvaluationConfig
from ..fmn_core.evaluation.evaluate import evaluate, with_evaluation
from ..fmn_core.evaluation.plot import draw_report
from ..fmn_core.hosts.comfy.clip import clip_scorer
from ..fmn_core.hosts.comfy.model import ComfyHost
from ..fmn_core.log import displayable
from .patch import as_patch
from .schema import LoraModel, schema, settings_inputs


class EvaluatePatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_EvaluatePatch",
            display_name="Evaluate Forget Patch",
            description="Measures what a patch forgets, what it harms and what brings the concept back, at equal seeds "
            "with and without it.",
            search_aliases=["measure patch", "forget report", "m-score"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without the patch. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                LoraModel.Input("lora", tooltip="The patch that Forget Concept made."),
                *settings_inputs(EvaluationConfig),
                io.Vae.Input("vae", optional=True, tooltip="Without it there are figures, but no pictures."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For CLIP scores: the CLIP Vision model that belongs to the text encoder, ViT-H for SD2.x, "
                    "ViT-bigG for SDXL. There is none for SD1.x.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures of the concept to learn words from (a VAE is needed then). Without them the model "
                    "makes its own.",
                ),
            ],
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The same patch with the report in it, for Save Forget Patch."
                ),
                io.Image.Output(
                    display_name="IMAGE", tooltip="The report as a picture: before and after, attention, and bars."
                ),
                io.String.Output(display_name="json", tooltip="The report with every figure, as JSON."),
                io.String.Output(display_name="summary", tooltip="What the figures say, its warnings first."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, lora, *, vae=None, clip_vision=None, images=None, **settings) -> io.NodeOutput:
        patch = as_patch(lora)
        scorer = None if clip_vision is None else clip_scorer(clip, clip_vision)
        with torch.inference_mode(False):  # the graph runs in inference mode, whose tensors autograd refuses
            images = None if images is None else images.clone()
            host = ComfyHost(model, clip, vae)
            evaluation = evaluate(host, patch, EvaluationConfig(**settings), clip=scorer, images=images)
        text = evaluation.report["summary"]
        if evaluation.report["warnings"]:
            logging.warning("Evaluate Forget Patch: %s", displayable(text))
        return io.NodeOutput(
            with_evaluation(patch, evaluation.report),
            draw_report(evaluation)[None],
            json.dumps(evaluation.report, indent=1),
            text,
            ui=ui.PreviewText(text),
        )
