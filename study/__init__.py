"""What makes RESULTS.md: the runs of `study.study`, its tables and its figures."""
