"""What a run found, for people: reads results and run directories, computes nothing."""
