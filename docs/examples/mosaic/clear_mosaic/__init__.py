"""Mosaic, a toy family: a Llama that writes text and draws pictures as tiles of a palette."""
