"""What stage two is made of: batches, objective, step, validation, checkpoints, reports, tables of ablations."""
