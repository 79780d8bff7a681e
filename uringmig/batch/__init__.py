"""Many archive jobs in one run: bounded, checked, resumable."""
