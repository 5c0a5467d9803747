"""Measurements. Not part of the wheel."""
