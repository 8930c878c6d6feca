"""The tests: they mirror the package, and share helpers as ``tests.name``."""
