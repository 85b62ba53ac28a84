"""What units cost that a user counts, and goals stated in it."""
