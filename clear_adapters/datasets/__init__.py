"""Training data: examples, their folders, and the traces that are built from them."""

from clear_adapters.datasets.example import Example, check, read_examples, split_examples, write_examples

__all__ = ["Example", "check", "read_examples", "split_examples", "write_examples"]
