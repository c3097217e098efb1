"""What keeps a run's files whole: files, run folders, records, interruption. Imports nothing of ours."""
