"""Tasks of EleutherAI's lm-evaluation-harness, asked of a run's model without an export."""
