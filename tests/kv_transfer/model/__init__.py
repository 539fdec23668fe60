"""Two nodes with their real classes, a network that misbehaves between them, and no clock."""
