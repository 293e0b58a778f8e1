"""Solvers inside pipelines: one row for each pipeline class."""
