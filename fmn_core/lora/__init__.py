"""LoRA modules, low-rank factors, and the names of layers."""
