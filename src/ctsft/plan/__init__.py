"""Plan: methods raced against each other on a user's own data, and what follows from it."""
