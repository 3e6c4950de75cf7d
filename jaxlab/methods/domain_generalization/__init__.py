"""Domain generalisation: training on several environments, for one that was never seen."""
