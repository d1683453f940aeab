"""What only the demo needs: its prompts and its reward functions."""
