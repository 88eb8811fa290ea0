"""What makes the numbers of a fit doubtful; each reason is a sentence."""
