"""`gfs pilot`: a few hundred steps of a job at several rates, and whether the signals behave on it."""
