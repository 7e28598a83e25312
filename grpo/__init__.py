"""GRPO: grouped rollouts, group-relative advantages, the clipped loss with KL, the optimiser.

The training loop that puts them together is in train.py.
"""
