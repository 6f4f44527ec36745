"""Presets of :mod:`samfeat.pipelines.config`: each file holds what it changes, nothing else."""
