"""What `report` compares: runs and what is known about them, and their curves."""
