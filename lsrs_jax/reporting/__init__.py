"""What `report` compares: runs and what is known about them, their curves, and the page for the browser."""
