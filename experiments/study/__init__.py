"""The published study: its data, its plans, and the code that runs and evaluates them."""
