"""From raw text to text that is worth training on: steps, near-duplicates, and what each dropped."""
