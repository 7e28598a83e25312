"""What a run would take, before it is begun: `train.py --dry-run`. Nothing else in the house
imports it.
"""
