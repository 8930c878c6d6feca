"""Handlers: how an op is smoothed."""
