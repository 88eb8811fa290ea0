"""What a plan knows to the byte: parameters, the memory of a rank, how ZeRO keeps and gathers them."""
