"""The keeper: one process for each user and machine, which serves the ties of all jobs, at home and away."""
