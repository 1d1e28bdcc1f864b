"""What cuts across chapters. `python -m tests` runs everything, as `make test` does."""
