"""Samplers: they drive a session, in any runtime. No torch in here."""
