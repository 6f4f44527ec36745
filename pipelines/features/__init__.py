"""Feature extractors behind one interface, and feature files."""
