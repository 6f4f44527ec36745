"""What stage one is made of: its inputs by name, its plan, its workers."""
