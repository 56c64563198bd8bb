"""What both ways back know of the solve: what it recorded and saved, when it made its
steps, and whether its states were found again and were right.
"""
