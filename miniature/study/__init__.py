"""SFT against GRPO on the miniature: which arms, chosen how, and what came out."""
