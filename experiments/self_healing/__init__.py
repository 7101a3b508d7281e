"""Whether training heals itself: false alarms of healthy runs, injected faults, and what watching costs."""
