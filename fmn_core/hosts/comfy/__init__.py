"""ComfyUI's adapter."""
