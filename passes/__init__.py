"""Passes: pure functions `Program -> Program`, each doing one thing; the order is in compiler.py."""
