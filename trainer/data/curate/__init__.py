"""From raw text to text worth training on: steps, near-duplicates, and what each dropped."""
