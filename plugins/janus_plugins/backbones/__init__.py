"""Language models, opened up."""
