"""What a run should be watched for: closeness to the teacher (C2), trainability, health (docs/metrics.md)."""
