"""Tests of the feed-forward seam: mixtures of experts, routers, balance rules, capacity."""
