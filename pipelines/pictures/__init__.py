"""Pictures, charts and pages: from arrays to what people look at."""
