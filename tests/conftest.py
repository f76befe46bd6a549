"""What all tests share."""

from small_examples import one_thread, text_file

__all__ = ["one_thread", "text_file"]
