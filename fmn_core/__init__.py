"""Forget-Me-Not: concept forgetting by attention re-steering (Zhang et al., arXiv 2303.17591), for any host."""

__version__ = "0.1.0"
