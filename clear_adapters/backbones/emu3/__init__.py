"""Emu3 (arXiv 2409.18869) on the classes of transformers."""
