"""The parts of stage two: loader, batches, objective, validation, checkpoints, reports, tables of ablations."""
