"""Generators: plain diffusion transformers that know nothing of teachers."""
