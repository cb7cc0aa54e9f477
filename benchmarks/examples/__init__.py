"""Training runs for a laptop: `python -m benchmarks.examples.<name>`, or `make examples` for all of them.

Each is one file with a plain torch loop. It shows a progress bar, goes on where it was killed, and leaves its numbers
and a plot drawn from them alone in benchmarks/results/examples.
"""
