"""Certificates: the exact expectation of each estimator, in programs of each structure."""
