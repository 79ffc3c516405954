"""Forge's own package: its presence is what tells Forge from the webui it comes from."""
