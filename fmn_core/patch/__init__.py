"""The patch, its file, its bounds, stacking and gating."""
