"""Sessions: checks arguments, runs the steps of a call, and recovers when memory or compilation fails."""
