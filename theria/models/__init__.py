"""Models that theria trains: plain ``torch.nn`` modules, free of Lightning."""
