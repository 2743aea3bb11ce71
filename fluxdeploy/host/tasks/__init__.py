"""What a picture is made from besides its prompt: one module a task."""
