"""Ops: what has no derivative, as effects."""
