"""Runs on several ranks, which every test starts as a user does."""
