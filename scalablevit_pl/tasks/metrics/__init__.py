"""What an evaluation counts: sums over samples, exact on any number of processes."""
