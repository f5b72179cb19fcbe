"""What unit 07 states."""
