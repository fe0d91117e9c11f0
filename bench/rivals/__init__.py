"""Other servers and libraries on the same machine, model and work: set up, run, compared."""
