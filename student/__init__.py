"""The student: network, losses, extractor. Imports torch and itself, nothing else of the project."""
