"""Sigmas, solvers, guidance, context windows. Never sees a model class."""
