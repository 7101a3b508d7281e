"""Lightning callbacks: what is measured, logged, saved and healed while training runs."""
