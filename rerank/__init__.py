"""From candidates to an order: scorers, attention, training, attention maps."""
