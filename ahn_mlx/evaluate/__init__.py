"""Does it remember, and does it score as the paper says: suites, scorers, synthetic tasks."""
