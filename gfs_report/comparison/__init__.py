"""`gfs compare`: sets of runs, and what an A/B test says of them."""
