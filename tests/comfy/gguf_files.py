"""GGUF files of a model's weights, by the ComfyUI-GGUF pack where FMN_COMFYUI_GGUF names it, or by a stand-in for it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

MIXED = ("Q4_0", "Q8_0", "BF16", "F16", "F32")  # from layer to layer, in one file


class Pack:
    """ComfyUI-GGUF, or its stand-in: makes a file's tensors of weights, and a MODEL of those."""

    def __init__(self, folder: Path):
        self.folder, where = folder, os.environ.get("FMN_COMFYUI_GGUF")
        if where:
            spec = importlib.util.spec_from_file_location("comfyui_gguf", f"{where}/__init__.py")  # as the host loads it
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[spec.name])
            nodes, dequant = (importlib.import_module(f"{spec.name}.{name}") for name in ("nodes", "dequant"))
            self.ops, self.patcher, self.nodes = nodes.GGMLOps, nodes.GGUFModelPatcher, nodes
            self.dequantize_tensor = dequant.dequantize_tensor
        else:
            import gguf_stand_in as pack

            self.ops, self.patcher, self.nodes = pack.GGMLOps, pack.GGUFModelPatcher, None
            self.dequantize_tensor = pack.dequantize_tensor

    def tensors(self, weights: dict[str, torch.Tensor], kinds: dict[str, str], family: str) -> dict[str, torch.Tensor]:
        """The tensors of a GGUF file with these weights, each in its kind."""
        if not self.nodes:
            import gguf_stand_in as pack

            return {key: pack.quantize(weight, pack.Kind[kinds[key]]) for key, weight in weights.items()}
        import gguf

        file = self.folder / f"{self.folder.name}.gguf"
        writer = gguf.GGUFWriter(file, family)
        for key, weight in weights.items():
            kind = gguf.GGMLQuantizationType[kinds[key]]
            writer.add_tensor(key, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.nodes.gguf_sd_loader(str(file))

    def load(self, tensors: dict[str, torch.Tensor]):
        """MODEL of what `tensors` has made, by the pack's own loader where there is one."""
        import comfy.sd
        import folder_paths

        if self.nodes:
            folder_paths.add_model_folder_path("unet", str(self.folder))
            folder_paths.add_model_folder_path("diffusion_models", str(self.folder))
            return self.nodes.UnetLoaderGGUF().load_unet(f"{self.folder.name}.gguf")[0]
        options = {"custom_operations": self.ops}
        return self.patcher.clone(comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options))

    def rebuilt(self, model, tensors: dict[str, torch.Tensor]):
        """MODEL of the architecture of another, for one that no loader knows."""
        import comfy.model_patcher

        own = model.model.model_config
        config = type(own)(own.unet_config)
        config.unet_config, config.custom_operations = own.unet_config, self.ops
        rebuilt = type(model.model)(config, model_type=model.model.model_type)
        rebuilt.diffusion_model.load_state_dict(tensors)
        patcher = comfy.model_patcher.ModelPatcher(rebuilt.eval(), model.load_device, model.offload_device)
        return self.patcher.clone(patcher)


def kinds_of(weights: dict[str, torch.Tensor], kind: str) -> dict[str, str]:
    """Weight -> its kind in a file: as converters do it, matrices alone are quantised, and only those of whole blocks."""
    kinds = {key: "F32" for key in weights}
    kinds |= {key: "BF16" if kind in ("BF16", "mixed") else "F16" for key, weight in weights.items() if weight.ndim == 4}
    for number, key in enumerate(key for key, weight in weights.items() if weight.ndim == 2):
        asked = MIXED[number % len(MIXED)] if kind == "mixed" else kind
        kinds[key] = asked if weights[key].shape[1] % 32 == 0 or not asked.startswith("Q") else "F16"
    return kinds
