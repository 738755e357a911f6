"""What finished runs show: statistics of studies, summaries, the report."""
