"""Training data: examples, their folders, and the traces that are built from them."""

from clear_adapters.datasets.example import Example, read_examples, split_examples, write_examples

__all__ = ["Example", "read_examples", "split_examples", "write_examples"]
