"""What a patch's file says of itself to other tools. Its own facts are under `fmn.patch`, by schema.py."""

from __future__ import annotations

from ..log import replace_surrogates
from .patch import Patch
from .schema import FAMILIES


def metadata(patch: Patch, name: str, digest: str) -> dict[str, str]:
    """What goes into a file beside a patch's tensors, or its UNet LoRA's, of this sha256: keys that kohya's tools, the
    webuis and model managers read. No date: the same patch gives the same file."""
    info, base = patch.info, patch.info["base"]
    version, architecture = FAMILIES[base["family"]]
    written = ("seed",) if info["settings"].get("preset") == "fast" else ("seed", "steps", "learning_rate")
    values = info["settings"] | {key: info["report"][key] for key in ("steps",) if key in info["report"]}
    training = {f"ss_{key}": str(values[key]) for key in written if key in values}
    title = f"Forget {info['concept']}"
    keys = {
        "ss_base_model_version": version,
        "ss_v2": str(base["family"].startswith("sd2")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(patch.rank),
        "ss_network_alpha": str(float(patch.rank)),
        "ss_output_name": name,
        **training,
        "ss_training_comment": f"{title}: a patch of Forget-Me-Not {info['version']}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": f"Makes the model forget `{info['concept']}`. Hides it from prompts, deletes nothing.",
        "modelspec.usage_hint": "Apply at strength 1; no trigger word.",
        "modelspec.hash_sha256": "0x" + digest,
        "sshs_model_hash": digest,
    }
    return replace_surrogates(keys)
