"""The adapters of the AUTOMATIC1111 webui and of Forge."""
