"""The method: grouped rollouts, group-relative advantages, the clipped loss with KL, the optimiser.
See train.py.
"""
