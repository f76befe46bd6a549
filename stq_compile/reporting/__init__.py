"""What happened in a run: recorded, saved as JSON lines, and shown in the terminal or as a page."""
