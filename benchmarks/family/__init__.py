"""What bench_family.py measures: a module for each page of docs/ about the family."""
