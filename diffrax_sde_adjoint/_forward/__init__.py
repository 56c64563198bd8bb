"""The forward solve, and what both ways back know of it: its tape (when each step was
made, and whether after a jump), what it saved, how its controller decides, and whether
its states were found again and were right.
"""
