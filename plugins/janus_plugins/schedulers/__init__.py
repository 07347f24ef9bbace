"""Schedulers: they decide which requests of an engine get rows. No torch in here."""
