"""Benchmarks of xformer_fast: cases, peers, the loop that times them, and plots drawn from its CSV alone."""
