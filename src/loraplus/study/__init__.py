"""Plans of runs, their records, and what the records say."""
