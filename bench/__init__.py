"""What Godwit costs, measured against the machine it runs on. `make bench`."""
