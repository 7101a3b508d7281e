"""Which ways of breaking attention break second-order meta-learning, and which diagnostics see it."""
