"""The nodes of Forget-Me-Not for ComfyUI."""

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from ..fmn_core.hosts.comfy import demo_models
from .attention import (
    CompareTokenAttention,
    RecordPictureAttention,
    RecordTokenAttention,
    SaveTokenAttention,
    VisualizeTokenAttention,
)
from .convert import ExportPatch, ImportPatch
from .evaluate import EvaluatePatch
from .forget import SETTINGS_NODES, ForgetConcept
from .gate import GatePatch
from .inspect_patch import InspectPatch
from .inversion import InvertConcept
from .patch import ApplyPatch, SavePatch
from .stack import StackPatches


class ForgetMeNotExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ForgetConcept,
            *SETTINGS_NODES,
            InvertConcept,
            SavePatch,
            ApplyPatch,
            StackPatches,
            GatePatch,
            EvaluatePatch,
            InspectPatch,
            ImportPatch,
            ExportPatch,
            RecordTokenAttention,
            RecordPictureAttention,
            VisualizeTokenAttention,
            CompareTokenAttention,
            SaveTokenAttention,
        ]


async def comfy_entrypoint() -> ForgetMeNotExtension:
    if demo_models.wanted():
        demo_models.register(Path(__file__).parent.parent / "demo")
    return ForgetMeNotExtension()
