"""What a bench has found: the record as JSON, tables, a plot, a page."""
