"""Lily: low-rank interconnected adaptation across layers."""
from lily._version import __version__
