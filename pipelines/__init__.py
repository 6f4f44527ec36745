"""The stages as verbs: sample, prepare, build the cache, inspect it, train, ablate, extract, match, evaluate."""
