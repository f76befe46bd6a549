"""What ``stq bench`` measures: packed steps beside stock ones, in one process, in turns."""
