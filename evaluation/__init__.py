"""What a model is worth: greedy answers, accuracy with intervals."""
