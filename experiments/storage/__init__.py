"""Storage that survives interruptions: files, run folders, typed records, signals. Imports nothing else of ours."""
