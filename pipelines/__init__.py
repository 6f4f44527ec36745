"""The stages as verbs: sample, build the cache, inspect it, train, extract, match, evaluate."""
