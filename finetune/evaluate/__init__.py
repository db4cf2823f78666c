"""Measure the base against the tuned model, and talk to either."""
