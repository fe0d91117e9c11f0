"""What a machine could do at best, by arithmetic alone: `manylora plan`."""
