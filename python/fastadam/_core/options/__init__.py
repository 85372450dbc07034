"""What a user sets on an optimizer."""
