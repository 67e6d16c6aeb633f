"""What makes a CPU fast; nobody with a GPU runs it."""
