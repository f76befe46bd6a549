"""Passes: pure functions `Program -> Program`, one job each; the order is in compiler.py."""
