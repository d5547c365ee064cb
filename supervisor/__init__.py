"""everstep: keeps a distributed PyTorch training run going."""
