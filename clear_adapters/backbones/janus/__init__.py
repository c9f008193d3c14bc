"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811) on the classes of transformers."""
