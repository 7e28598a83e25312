"""Time and memory of a GRPO step, compared with other ways of doing the same work.

The figures and their discussion are in BENCHMARKS.md.
"""
