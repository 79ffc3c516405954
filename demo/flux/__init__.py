"""The second demo model: Flux's architecture, and a text encoder that never saw a caption of the demo's."""

from ..launch_comfyui import name_missing_operators

name_missing_operators()  # before transformers imports a torchvision that has no build for this CPU
