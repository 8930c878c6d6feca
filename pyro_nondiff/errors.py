"""The roots of every error and warning that the library raises.

Example:
    >>> from pyro_nondiff.errors import NonDiffError
    >>> issubclass(NonDiffError, ValueError)
    True
"""

__all__ = ["NonDiffError", "NonDiffWarning"]


class NonDiffError(ValueError):
    """A program, an estimator or an argument that the library cannot serve.

    The message names the site or the argument, what was found, and what to do
    instead. When it is raised during a step, nothing has been trained.
    """


class NonDiffWarning(UserWarning):
    """Something works, but not as well as the program's author may think."""
