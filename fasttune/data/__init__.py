"""Rows → text → tokens and labels. Pure functions; no torch."""
