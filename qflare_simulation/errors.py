"""Errors of a simulation."""


class SimulationError(ValueError):
    """A simulation cannot be run, or was stopped; the message says why and what to change."""


class TrainingFailedError(SimulationError):
    """Too many devices failed in one round; the message holds what the first of them raised."""
