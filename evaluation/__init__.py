"""What a model is worth, and whether the figure means what it seems to mean: answers, accuracy,
audits, the report.
"""
