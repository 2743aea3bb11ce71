"""What a component keeps of its quality in few bits, and the recipe that keeps a promise."""
