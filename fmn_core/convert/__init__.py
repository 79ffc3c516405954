"""Patches in and out of the formats of other tools."""
