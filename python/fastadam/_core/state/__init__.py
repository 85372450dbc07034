"""What an optimizer keeps for each variable: slots, and the count of calls."""
