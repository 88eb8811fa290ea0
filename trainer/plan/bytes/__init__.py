"""What a plan knows to the byte: parameters, memory of a rank, what ZeRO keeps and gathers."""
