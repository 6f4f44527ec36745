"""Feature extractors behind one interface, and the files that features are kept in."""
