"""What a GRPO step costs, beside other ways of doing the same work. Figures and their discussion:
BENCHMARKS.md.
"""
