"""Commands, started in the repository's folder as `python -m benchmarks.NAME`, each with `--help`: ablation, bases, grid,
plot_speed, quality, recording, speed, stacking. The other modules are what these are made of.
"""
