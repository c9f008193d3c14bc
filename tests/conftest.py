"""Settings of every test."""

import torch

# Toy models on shared cores: threads of several test processes only wait for each other.
torch.set_num_threads(1)
