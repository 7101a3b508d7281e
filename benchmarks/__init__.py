"""Speed and memory, always as a ratio against a named peer in the same run."""
