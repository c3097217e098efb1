"""Time, memory and accuracy of this project next to other programs on the same weights."""
