"""`gfs rate`: a learning rate for a user's own job, tried out before its training."""
