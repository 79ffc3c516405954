"""What the core may ask of a diffusion host; one module beside this one adapts each host."""
