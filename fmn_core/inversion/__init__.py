"""Learned words."""
