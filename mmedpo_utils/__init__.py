"""Helpers behind the MMedPO notebooks: clinical-aware preference optimisation of medical vision-language models."""

__version__ = "0.1.0"
