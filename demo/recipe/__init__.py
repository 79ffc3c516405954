"""How the demo model was made: `python -m demo.recipe.train`."""

from ..launch_comfyui import name_missing_operators

name_missing_operators()  # before transformers imports a torchvision that has no build for this CPU
