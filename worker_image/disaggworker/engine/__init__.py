"""What runs when: sequences, batches, steps, and the tokens that come of them."""
