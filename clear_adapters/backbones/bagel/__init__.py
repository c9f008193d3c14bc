"""BAGEL: its own small model package, its facts and its verbs."""
