"""What the update asks of a policy family."""
