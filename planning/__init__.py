"""Estimates a run's memory, time and disk space for `train.py --dry-run`, its only user."""
