"""The benchmarks: each command prints a table and writes its figures as JSON with --out."""
