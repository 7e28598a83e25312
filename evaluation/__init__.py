"""Measure a model's accuracy, and audit it: answers, probes, statistics, audits, the report."""
