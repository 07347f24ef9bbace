"""Loops that drive a session; no torch in here."""
