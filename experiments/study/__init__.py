"""The published study: its data, its plans, and what runs and evaluates them."""
