"""The adapter of diffusers' pipelines."""
