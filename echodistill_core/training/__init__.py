"""Training: trained parameters, the three steps of an iteration, the loop, and run folders."""
