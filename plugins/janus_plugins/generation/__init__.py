"""Generation paths: everything about drawing."""
