"""What the memory language model learns: text beside xz, recall beside its controls, over a run."""
