"""What results say: intervals, claims with verdicts, and what single tensors lose."""
