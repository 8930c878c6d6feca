"""The engine: worlds, costs, objectives."""
