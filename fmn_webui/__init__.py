"""Forget-Me-Not in the AUTOMATIC1111 webui and Forge: the tab, the script beside every generation, the API."""
