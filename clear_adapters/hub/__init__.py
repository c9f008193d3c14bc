"""Adapters on the Hub: pushing a folder in one commit, and cards rendered from recorded facts. Needs no model."""
