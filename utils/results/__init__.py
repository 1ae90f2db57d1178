"""What a run has reached: metrics, results.json, the report, tables over runs."""
