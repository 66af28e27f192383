"""What networks and loaders cost: counted and measured."""
