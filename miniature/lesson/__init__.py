"""What each knob of GRPO does to the gradient, on a policy so small that the exact one is known."""
