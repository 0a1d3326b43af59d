"""The planner for clusters."""
